"""gmemctl fork: ten Linux guests go on from one, on one copy of its memory."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from gmemd.client.client import Client
from gmemd.client.running import RunningGmemd
from tests.guests.linux import SIZE, LinuxGuest, Mark, needs_qemu
from tests.patience import PATIENCE, wait_for
from tests.programs import gmemctl, output

pytestmark = [pytest.mark.e2e, needs_qemu]
GUESTS = 10
_COUNTED = re.compile(rb"C (\d+) boot=([0-9a-f]{8})\r?\n")


class Site:
    """A gmemd with the object ram0, and a guest that runs on it in the QEMU "first"."""

    def __init__(self, directory: Path, gmemd: RunningGmemd, client: Client) -> None:
        self.directory = directory
        self.gmemd = gmemd
        self.client = client
        self.guest = LinuxGuest(directory)
        client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "ram0", "size": SIZE})
        self.first = subprocess.Popen(self.gmemctl("exec", "ram0", "--", *self.guest.command("first")))

    def gmemctl(self, *words: str) -> list[str]:
        return gmemctl("--socket", self.gmemd.socket, *words)

    def clone(self, *more: str, share: str = "off") -> list[str]:
        """The words of the QEMU of a clone."""
        return self.guest.command("c{n}", *more, share=share, console=self.directory / "console-{n}")

    def fork(self, *words: str, status: int = 0) -> str:
        return output(self.gmemctl("-o", "json", "fork", "ram0", *words), status=status)

    def went_on(self, number: int, sums: int = 1) -> Mark:
        """Assert that a clone counts on from where the original was; its first counter."""
        console = self.directory / f"console-{number}"
        wait_for(lambda: console.exists() and _COUNTED.search(console.read_bytes()))
        found = _COUNTED.search(console.read_bytes())
        assert found is not None
        mark = Mark(found[2].decode(), int(found[1]), 0)
        self.guest.check_went_on(mark, sums=sums, console=console)
        return mark

    def digests(self, name: str) -> Any:
        self.client.execute("memdev-verify", {"id": name, "job-id": "v"})
        wait_for(lambda: self.client.execute("query-jobs")[0]["status"] == "concluded")
        found = self.client.execute("query-memdev-digests", {"job-id": "v"})
        self.client.execute("job-dismiss", {"id": "v"})
        return found


@contextmanager
def killed(pids: list[int]) -> Iterator[None]:
    """Kill processes that are not our children in the end."""
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not any(os.path.exists(f"/proc/{pid}/exe") for pid in pids))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with RunningGmemd() as gmemd, gmemd.client(timeout=PATIENCE) as client:
        made = Site(tmp_path_factory.mktemp("fork"), gmemd, client)
        try:
            made.guest.wait_started()
            yield made
        finally:
            made.first.kill()
            made.first.wait()


def occupied(pid: int) -> tuple[int, int]:
    """What a QEMU has of its own, and with its share of shared memory without RAM: bytes."""
    rows = dict(re.findall(r"^(\w+): +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE))
    return int(rows["Pss_Anon"]) << 10, int(rows["Pss_File"]) << 10


def test_it_counts_and_stops(site: Site) -> None:
    """The guest is what the tests take it for: when it is stopped it says nothing, and goes on with the next number."""
    with Client(site.guest.qmp("first"), timeout=PATIENCE) as monitor:
        monitor.execute("stop")
        assert site.guest.is_quiet()
        mark = site.guest.mark()
        monitor.execute("cont")
    site.guest.check_went_on(mark, sums=1)
    assert site.guest.run("first", "echo $((6 * 7))") == "42"


def test_a_guest_forks(site: Site) -> None:
    """Ten guests and the original go on; the template stays as it is, and is there once."""
    mark = site.guest.mark()
    own = sum(occupied(site.first.pid))
    made = site.fork("-n", str(GUESTS), "--name", "c{n}", "--qmp", str(site.guest.qmp("first")), "--", *site.clone())
    rows = json.loads(made)
    with killed([row["pid"] for row in rows]):
        assert [row["id"] for row in rows] == [f"c{n}" for n in range(1, GUESTS + 1)]
        assert len({row["mac"] for row in rows}) == len({row["uuid"] for row in rows}) == GUESTS
        before = site.digests("ram0-template")
        marks = [site.went_on(n) for n in range(1, GUESTS + 1)]
        assert len(set(marks)) == 1
        site.guest.check_went_on(mark, sums=1)
        assert marks[0].boot == mark.boot
        assert marks[0].count >= mark.count
        [group] = site.client.execute("query-memdev-clones")
        assert (group["id"], len(group["clones"]), len(group["users"])) == ("ram0-template", GUESTS, GUESTS)
        written = sum(user["written"] for user in group["users"])
        found = group["resident"] + sum(sum(occupied(row["pid"])) for row in rows)
        assert found <= 1.2 * (group["resident"] + written + GUESTS * own)
        print(f"{found >> 20} MiB: template {group['resident'] >> 20}, written {written >> 20}, QEMU {own >> 20} each")
        assert site.digests("ram0-template")[:len(before)] == before
    for n in range(1, GUESTS + 1):
        site.client.execute("object-del", {"id": f"c{n}"})
    site.client.execute("object-del", {"id": "ram0-template"})
