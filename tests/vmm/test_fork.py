"""gmemctl fork with the smallest guest: from a checkpoint or as it is now, and what is left when it fails: nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from gmemd.client.client import Client
from gmemd.client.running import RunningGmemd
from gmemd.vmm.ending import VmmError
from gmemd.vmm.qemu import Qemu
from tests.daemon import Daemon
from tests.e2e.test_docs import blocks, user_environment
from tests.guests.firmware import SIZE, FirmwareGuest
from tests.guests.linux import needs_qemu
from tests.patience import PATIENCE, wait_for
from tests.programs import ROOT, gmemctl

pytestmark = [pytest.mark.e2e, needs_qemu]


class Site:
    """A gmemd with the object ram0, and a guest that runs on it in the QEMU "first"."""

    def __init__(self, directory: Path, gmemd: RunningGmemd, client: Client) -> None:
        self.gmemd, self.client = gmemd, client
        client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "ram0", "size": SIZE})
        _, [fd] = client.execute_fds("memdev-get-fd", {"id": "ram0"})
        self.guest = FirmwareGuest(directory, fd)
        os.close(fd)
        self.first = subprocess.Popen(self.words("exec", "ram0", "--", *self.guest.command("first")))
        self.guest.wait_runs()

    def words(self, *words: str) -> list[str]:
        return gmemctl("--socket", self.gmemd.socket, *words)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.words(*words), capture_output=True, text=True, timeout=PATIENCE, check=False)

    def command(self, *more: str, memory: str = "", machine: str = "pc-i440fx-7.2", name: str = "{id}") -> list[str]:
        """The words of the QEMU of a clone."""
        return [word.replace("share=on", "share=off") for word in
                self.guest.command(name, *more, memory=memory, machine=machine)]

    @contextmanager
    def fork(self, *words: str) -> Iterator[list[dict[str, Any]]]:
        """What gmemctl fork has started; killed in the end."""
        done = self.run("-o", "json", "fork", *words)
        assert done.returncode == 0, done.stderr
        assert "the guests have the same random numbers" in done.stderr
        rows = json.loads(done.stdout)
        try:
            yield rows
        finally:
            for row in rows:
                with suppress(ProcessLookupError):
                    os.kill(row["pid"], signal.SIGKILL)
            wait_for(lambda: not any(os.path.exists(f"/proc/{row['pid']}/exe") for row in rows))
            for row in rows:
                self.client.execute("memdev-delete", {"id": row["id"], "force": True})

    def counted(self, row: dict[str, Any]) -> tuple[int, int]:
        """How often a clone was started, and where it is."""
        with Qemu(row["qmp"], PATIENCE) as qemu:
            said = qemu.ask("human-monitor-command", {"command-line": "xp /2wx 0x1000"})
        starts, count = re.findall(r"0x([0-9a-f]{8})", said)
        return int(starts, 16), int(count, 16)

    def goes_on(self, row: dict[str, Any], count: int) -> None:
        """Assert that a clone counts on from there, and stop it: it takes a CPU."""
        starts, now = self.counted(row)
        assert (starts, now >= count) == (1, True)
        wait_for(lambda: self.counted(row)[1] > now)
        with Qemu(row["qmp"], PATIENCE) as qemu:
            qemu.stop()

    def digests(self, name: str) -> list[dict[str, Any]]:
        self.client.execute("memdev-verify", {"id": name, "job-id": "v"})
        wait_for(lambda: [job for job in self.client.execute("query-jobs") if job["status"] == "concluded"])
        found: list[dict[str, Any]] = self.client.execute("query-memdev-digests", {"job-id": "v"})
        self.client.execute("job-dismiss", {"id": "v"})
        return found

    def objects(self) -> set[str]:
        return {one["id"] for one in self.client.execute("query-memdev")}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("fork")
    with RunningGmemd("--snapshots", str(directory / "snapshots")) as gmemd, gmemd.client(timeout=PATIENCE) as client:
        made = Site(directory, gmemd, client)
        try:
            yield made
        finally:
            made.first.kill()
            made.first.wait()


def test_from_checkpoints(site: Site) -> None:
    """Each fork of a checkpoint has the same template, which is restored once; without a name it is the latest."""
    for _ in range(2):
        done = site.run("checkpoint", "ram0", "--qmp", str(site.guest.qmp("first")))
        assert done.returncode == 0, done.stderr
    count = site.guest.count
    with site.fork("ram0@1", "-n", "2", "--name", "a{n}", "--", *site.command()) as first, \
            site.fork("ram0@1", "--name", "b", "--", *site.command(memory="{ID}")) as second:
        for row in first + second:
            site.goes_on(row, 1)
        assert min(site.counted(row)[0] for row in first) == 1
        [group] = site.client.execute("query-memdev-clones")
        assert (group["id"], group["clones"]) == ("ram0-1-template", ["a1", "a2", "b"])
        [status] = site.client.execute("query-memdev-status", {"id": "b"})
        assert status["runner"]["pid"] == second[0]["pid"]
        with site.fork("ram0", "--template", "t", "--", *site.command()) as third:
            assert [row["id"] for row in third] == ["ram0-1"]
            site.goes_on(third[0], 1)
            assert len(site.client.execute("query-memdev-clones")) == 2
    site.guest.wait_runs()
    assert site.guest.count > count
    for name in ("t", "ram0-1-template"):
        site.client.execute("object-del", {"id": name})


def test_as_it_is_now(site: Site) -> None:
    """The original goes on, too, whether it ran or not stays as it was; sockets that are not named are made."""
    count = site.guest.count
    with Qemu(str(site.guest.qmp("first")), PATIENCE) as qemu:
        qemu.stop()
    command = [word.replace("share=on", "share=off") for word in site.guest.command("", qmp=False)]
    with site.fork("ram0", "-n", "2", "--qmp", str(site.guest.qmp("first")), "--", *command) as rows:
        assert [row["id"] for row in rows] == ["ram0-1", "ram0-2"]
        for row in rows:
            site.goes_on(row, count)
        assert not site.guest.runs()
    with Qemu(str(site.guest.qmp("first")), PATIENCE) as qemu:
        qemu.cont()
    site.guest.wait_runs()
    site.client.execute("object-del", {"id": "ram0-template"})


@pytest.mark.parametrize(("more", "command", "said"), [
    (["--name", "c{n}"], ["false"], "guest 'c1' cannot go on: "),
    (["--name", "c{n}"], ["/no/such/program", "{ram0}"], "guest 'c1' cannot go on: "),
    (["--name", "c{n}"], {"machine": "pc-q35-7.2"}, "Machine type received is 'pc-i440fx-7.2'"),
    (["--name", "c{n}"], {"memory": "/dev/zero"},
     "the VMM of 'c1' has not mapped the memory: its backend needs mem-path={ram0},share=off"),
    (["--name", "c{n}"], {"name": "one"}, "every QEMU needs a QMP socket of its own"),
    (["--name", "ram0"], {}, "--name 'ram0' needs {n}"),
    (["--name", "{n}"], {}, "expects an identifier"),
    (["--name", "c{n}", "--template", "ram0"], {}, "duplicate property 'ram0'"),
])
def test_nothing_is_left_of_what_fails(site: Site, more: list[str], command: list[str] | dict[str, str],
                                       said: str) -> None:
    """One sentence; no object, no process, and the original runs."""
    words = command if isinstance(command, list) else site.command(**command)
    before = site.objects()
    done = site.run("fork", "ram0", "-n", "2", "--qmp", str(site.guest.qmp("first")), *more, "--", *words)
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert site.objects() == before
    assert not running(str(site.guest.qmp("c1")))
    site.guest.wait_runs()


def test_a_killed_gmemctl_leaves_no_vmm(site: Site) -> None:
    """VMMs whose guests do not run yet end with it; the objects can be deleted, and the original runs."""
    words = site.words("fork", "ram0", "-n", "2", "--name", "k{n}", "--qmp", str(site.guest.qmp("first")), "--",
                       sys.executable, "-c", "import time; time.sleep(98765)")
    with subprocess.Popen(words) as fork:
        wait_for(lambda: running("sleep(98765)\0-incoming"))
        fork.kill()
    wait_for(lambda: not running("sleep(98765)\0-incoming"))
    site.guest.wait_runs()
    for name in ("k1", "k2", "ram0-template"):
        site.client.execute("object-del", {"id": name})


def running(words: str) -> bool:
    """Whether a process has these words in its command line."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if words.encode() in entry.read_bytes() and entry.parent.name != str(os.getpid()):
                return True
    return False


def test_no_checkpoint(site: Site) -> None:
    site.client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "other", "size": SIZE})
    done = site.run("fork", "other", "--", "true")
    assert (done.returncode, "there is no checkpoint of 'other'" in done.stderr) == (1, True)
    site.client.execute("object-del", {"id": "other"})


def test_the_page_says_it_right(tmp_path: Path) -> None:
    """The block of docs/qemu.md, as it stands there."""
    [text] = [text.replace("/tmp/", f"{tmp_path}/") for word, text in blocks(ROOT / "docs/qemu.md") if word == "fork"]
    with Daemon(kernel="simulated") as daemon, Client(str(daemon.sock), timeout=PATIENCE) as client:
        environment = user_environment(tmp_path, daemon)
        try:
            with (tmp_path / "said").open("w") as said:  # a pipe would not end before the original does
                done = subprocess.run(["bash", "-euc", text], env=environment, stdout=said, stderr=said,
                                      timeout=PATIENCE, check=False, cwd=tmp_path)
            assert done.returncode == 0, (tmp_path / "said").read_text()
            [group] = client.execute("query-memdev-clones")
            assert (group["id"], group["clones"], len(group["users"])) == ("vm2-template", ["c1", "c2", "c3"], 3)
        finally:
            for name in ("vm2", "c1", "c2", "c3"):
                with suppress(VmmError), Qemu(str(tmp_path / f"{name}.sock"), PATIENCE) as qemu:
                    qemu.quit()


def test_what_it_made_can_be_saved(site: Site) -> None:
    """A snapshot of a clone, and of a template, is one of the template's memory."""
    with site.fork("ram0", "--name", "c", "--qmp", str(site.guest.qmp("first")), "--", *site.command()):
        for name in ("c", "ram0-template"):
            site.client.execute("memdev-snapshot", {"id": name, "name": f"of-{name}", "fence": {"via": "unfenced"}})
            site.client.execute("memdev-restore", {"name": f"of-{name}", "id": f"again-{name}",
                                                   "allow-inconsistent": True})
        digests = [site.digests(name) for name in ("ram0-template", "again-c", "again-ram0-template")]
        assert digests[0] == digests[1] == digests[2] != []
    for name in ("again-c", "again-ram0-template", "ram0-template"):
        site.client.execute("object-del", {"id": name})


def test_from_a_swapped_checkpoint(tmp_path: Path) -> None:
    """The object itself is the template: nothing is copied, and the guest that went on elsewhere goes on."""
    with RunningGmemd("--snapshots", str(tmp_path / "snapshots")) as gmemd, gmemd.client(timeout=PATIENCE) as client:
        site = Site(tmp_path, gmemd, client)
        site.guest.memory.close()  # our own mapping of it
        try:
            done = site.run("-o", "json", "checkpoint", "ram0", "--swap", "--qmp", str(site.guest.qmp("first")), "--",
                            *site.command(name="private"))
            assert done.returncode == 0, done.stderr
            [private] = [one["pid"] for one in client.execute("query-memdev-holders", {"id": "ram0"})
                         if one["private-copy"]]
            before = site.digests("ram0")
            with site.fork("ram0", "-n", "2", "--name", "c{n}", "--", *site.command()) as rows:
                for row in rows:
                    site.goes_on(row, 1)
                [group] = client.execute("query-memdev-clones")
                assert (group["id"], group["clones"], len(group["users"])) == ("ram0", ["c1", "c2"], 3)
            assert os.path.exists(f"/proc/{private}")
            assert site.digests("ram0") == before
        finally:
            site.first.kill()
            site.first.wait()
            with suppress(VmmError), Qemu(str(site.guest.qmp("private")), PATIENCE) as qemu:
                qemu.quit()
