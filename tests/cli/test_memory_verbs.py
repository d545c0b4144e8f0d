"""gmemctl's verbs about survival, holders, visibility and jobs, against a running daemon; and doctor."""

from __future__ import annotations

import json
import mmap
import os

import pytest
import yaml

from gmemd.cli.doctor import BAD, GOOD, NOTE, judge_fd_store, judge_policy, judge_service
from gmemd.cli.gmemctl import main
from gmemd.client.client import Client
from gmemd.persist.keeping import Unit
from tests.cli.conftest import Gmemctl

GUEST = "memory-backend-guest-memfd"


@pytest.fixture
def guest(gmemctl: Gmemctl) -> Gmemctl:
    assert gmemctl("create", f"{GUEST},id=g0,size=1M").status == 0
    return gmemctl


def test_survive_tells_every_event(guest: Gmemctl) -> None:
    """Each event has a line, those that end the memory an advice; one object can be asked for."""
    lines = guest("survive").out.splitlines()
    assert lines[0].split()[:3] == ["ID", "EVENT", "SURVIVES"]
    assert [line.split()[2] for line in lines[1:]] == ["yes", "NO", "yes", *["NO"] * 6]
    assert "start gmemd under systemd or with --keeper" in lines[4]
    [only] = json.loads(guest("survive", "g0", "-o", "json").out)
    assert [fate["event"] for fate in only["survival"]][-1] == "power-loss"
    assert guest("survive", "nope").status == 1
    [shown] = [line for line in guest("show", "g0").out.splitlines() if line.startswith("survival")]
    assert shown.split(None, 1)[1] == "vmm-crash, client-disconnect"


def test_convert_and_ranges(guest: Gmemctl) -> None:
    """Sizes as people write them; the list shows what became of it, and every answer says what is simulated."""
    assert "64 KiB became private (simulated" in guest("convert", "g0", "private", "--offset", "64k",
                                                       "--size", "64K").out
    rows = [line.split() for line in guest("ranges", "g0").out.splitlines()[1:]]
    assert rows == [["0x0", "64", "KiB", "shared"], ["0x10000", "64", "KiB", "private"],
                    ["0x20000", "896", "KiB", "shared"]]
    assert json.loads(guest("convert", "g0", "shared", "-o", "json").out)["converted"] == 65536
    assert guest("convert", "g0", "private", "--offset", "lots").status == 2
    assert guest("convert", "g0", "private", "--offset", "1").status == 1


def test_who_lists_nobody(guest: Gmemctl) -> None:
    """An object that nobody has asked for has no holders."""
    assert guest("who", "g0").out.split() == ["PID", "COMMAND", "USER", "FDS", "MAPPED", "ACCESS", "CGROUP"]
    assert json.loads(guest("who", "g0", "-o", "json").out) == []


def test_verify_shows_digests(guest: Gmemctl, client: Client) -> None:
    """verify runs a job to its end, shows a digest for each chunk in memory, and leaves no job."""
    _, [fd] = client.execute_fds("memdev-get-fd", {"id": "g0"})
    with mmap.mmap(fd, 1 << 20) as memory:
        memory[:5] = b"hello"
    os.close(fd)
    found = json.loads(guest("verify", "g0", "-o", "json").out)
    assert [chunk["size"] for chunk in found] == [1 << 20]
    assert json.loads(guest("jobs", "-o", "json").out) == []
    assert guest("jobs", "--cancel", "nope").status == 1
    assert guest("create", "memory-backend-memfd,id=empty,size=1M").status == 0
    assert guest("verify", "empty") == (0, "", "gmemctl: nothing of 'empty' is in memory\n")


def test_jobs_are_followed_to_their_end(guest: Gmemctl, client: Client) -> None:
    """`jobs -f` comes back when all have ended, and lists them."""
    client.execute("memdev-populate", {"id": "g0", "job-id": "fill"})
    [job] = json.loads(guest("jobs", "-f", "-o", "json").out)
    assert (job["id"], job["status"], job["current-progress"]) == ("fill", "concluded", 1 << 20)
    header, line = guest("jobs").out.splitlines()
    assert header.split() == ["ID", "TYPE", "STATUS", "CURRENT-PROGRESS", "TOTAL-PROGRESS"]
    assert line.split()[:3] == ["fill", "populate", "concluded"]
    assert guest("jobs", "--dismiss", "fill").status == 0


def test_top_ends_after_its_count(guest: Gmemctl) -> None:
    """top shows what objects occupy, and sums it up."""
    out = guest("top", "-n", "1").out
    assert out.startswith("1 objects, ")
    assert "g0" in out
    words = ("top", "-n", "2", "-d", "0", "-o")
    for given in ([json.loads(line) for line in guest(*words, "json").out.splitlines()],
                  list(yaml.safe_load_all(guest(*words, "yaml").out))):
        assert [[one["id"] for one in found] for found in given] == [["g0"], ["g0"]]
    assert guest(*words, "name").out == "g0\ng0\n"


def test_doctor_checks_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    """Every finding has a verdict, and what follows where it is not good; the probe is in the JSON."""
    status = main(["doctor", "-o", "json"])
    findings = json.loads(capsys.readouterr().out)
    assert {finding["verdict"] for finding in findings} <= {GOOD, NOTE, BAD}
    assert all(finding["follows"] for finding in findings if finding["verdict"] != GOOD)
    assert {"kernel", "guest_memfd", "head-room", "RLIMIT_NOFILE", "cgroup", "service manager"} <= {
        finding["item"] for finding in findings}
    assert any(finding["item"].startswith("probe: create") for finding in findings)
    assert status == any(finding["verdict"] == BAD for finding in findings)
    main(["doctor"])
    assert "probe:" not in capsys.readouterr().out


def test_doctor_says_who_may_do_what(gmemctl: Gmemctl) -> None:
    """Here everybody who is let in, by a policy those whom it names; and nobody knows where no gmemd runs."""
    [found] = [one for one in json.loads(gmemctl("doctor", "-o", "json").out) if one["item"] == "policy"]
    assert (found["found"], found["verdict"]) == ("none", NOTE)
    said = gmemctl("--socket", "/no/such/socket", "doctor", "-o", "json").out
    [found] = [one for one in json.loads(said) if one["item"] == "policy"]
    assert (found["found"], found["verdict"]) == ("unknown", NOTE)
    assert judge_policy({"policy": True, "role": "tenant"}) == ("policy", "in force, you are tenant", GOOD, "")


@pytest.mark.parametrize(("limit", "configured", "announced", "verdict", "follows"), [
    (1024, "", False, GOOD, ""),
    (4, "4", False, GOOD, ""),
    (4, "", True, GOOD, ""),
    (4, "", False, BAD, "gmemd assumes 1024, but systemd silently drops what exceeds 4: also set"),
    (4000, "", False, NOTE, "gmemd keeps at most 1024 objects: also set Environment=GMEMD_FDSTORE=4000"),
    (0, "", True, BAD, "systemd keeps nothing"),
])
def test_doctor_judges_the_fd_store(limit: int, configured: str, verdict: str, follows: str, *,
                                    announced: bool) -> None:
    """Before systemd 254 gmemd is not told the limit: what it counts on must not be more than it is."""
    finding = judge_fd_store(limit, configured, announced=announced)
    assert (finding.found, finding.verdict) == (str(limit), verdict)
    assert follows in finding.follows


@pytest.mark.parametrize(("unit", "found"), [
    (Unit(), {"LimitNOFILE=": GOOD, "memory after gmemd-crash": GOOD, "memory after service-stop": GOOD,
              "memory after kexec": NOTE}),
    (Unit(preserve="no"), {"memory after gmemd-crash": BAD, "memory after gmemd-upgrade": BAD,
                           "memory after service-stop": NOTE}),
    (Unit(referred=False), {"memory after gmemd-crash": GOOD, "memory after service-stop": NOTE}),
    (Unit(preserve=""), {"memory after gmemd-crash": GOOD, "memory after service-stop": NOTE}),
    (Unit(nofile=1024), {"LimitNOFILE=": NOTE, "memory after gmemd-crash": GOOD}),
    (Unit(nofile=200, stored=300), {"LimitNOFILE=": BAD, "memory after gmemd-crash": BAD}),
    (Unit(loaded=False, stored=3), {"memory after gmemd-crash": BAD}),
    (Unit(loaded=False, limit=0), {"gmemd.service": NOTE}),
    (None, {"memory after gmemd-crash": NOTE, "memory after service-stop": NOTE}),
])
def test_doctor_judges_the_service(unit: Unit | None, found: dict[str, str]) -> None:
    """What systemd says of the service decides, and where it says nothing, the answer is not yes."""
    findings = {finding.item: finding for finding in judge_service(unit, "", announced=True, old=False)}
    assert {item: findings[item].verdict for item in found} == found
    assert all(finding.follows for finding in findings.values() if finding.verdict != GOOD)


def test_doctor_knows_what_a_container_can_be_given() -> None:
    """Fewer descriptors than LimitNOFILE= says; with the shipped unit's maximum that is enough."""
    def judged(limit: int) -> dict[str, str]:
        return {finding.item: finding.verdict for finding in judge_service(
            Unit(limit=limit, stored=limit), "", announced=True, old=False, contained=True)}

    item = "descriptors that podman can pass on"
    assert judged(2000)[item] == NOTE
    assert judged(2000)["memory after gmemd-crash"] == BAD
    assert item not in judged(930)
    assert judged(930)["memory after gmemd-crash"] == GOOD


def test_dry_run_changes_nothing(gmemctl: Gmemctl, client: Client) -> None:
    """A changing verb with --dry-run says what it would do, or why not; the next one without it finds all as it was."""
    spec = "memory-backend-memfd,id=dry0,size=1M"
    assert gmemctl("create", spec, "--dry-run") == (
        0, "object-add would create 'dry0', 1048576 bytes of memfd, which ends with gmemd\n", "")
    assert client.execute("query-memdev") == []
    assert gmemctl("create", spec).status == 0
    refused = gmemctl("create", spec, "--dry-run")
    assert (refused.status, refused.out) == (1, "")
    assert "attempt to add duplicate property 'dry0'" in refused.err
    assert gmemctl("rm", "dry0", "--dry-run").out.startswith("object-del would delete 'dry0'")
    assert gmemctl("call", "--dry-run", "quit").out == \
        "quit would end gmemd; of 1 objects 0 come back with the next one\n"
    words = ("call", "memdev-discard", "id=dry0", "offset=0", "size=4K", "--dry-run")
    told = json.loads(gmemctl("-o", "json", *words).out)
    assert (told["command"], told["arguments"]) == ("memdev-discard", {"id": "dry0", "offset": 0, "size": 4096})
    assert len(client.execute("query-memdev")) == 1
