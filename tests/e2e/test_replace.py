"""gmemctl replace: a running guest goes on in another QEMU; whatever dies meanwhile, it runs in exactly one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from gmemd.client.client import Client
from gmemd.client.running import RunningGmemd
from gmemd.errors import QmpError
from tests.guests.firmware import SIZE as FIRMWARE_SIZE
from tests.guests.firmware import FirmwareGuest
from tests.guests.linux import LinuxGuest, needs_qemu
from tests.patience import PATIENCE, wait_for
from tests.programs import ROOT, gmemctl

pytestmark = [pytest.mark.e2e, needs_qemu]

AFTER_THE_NOTE = 22  # messages, about: nothing has happened before


class House:
    """A gmemd under a keeper, and the object ram0."""

    def __init__(self, ends: ExitStack, size: int) -> None:
        self.gmemd = ends.enter_context(RunningGmemd(keep=True))
        self._ends = ends
        with self.client() as client:
            client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "ram0", "size": size,
                                          "share": True})

    def client(self) -> Client:
        return self.gmemd.client(timeout=PATIENCE, wait=PATIENCE)

    def start(self, command: Sequence[str]) -> None:
        """Run the first VMM; whichever runs in the end is killed."""
        process = subprocess.Popen(gmemctl("--socket", self.gmemd.socket, "exec", "ram0", "--", *command))
        self._ends.callback(process.wait)
        self._ends.callback(process.kill)
        self._ends.callback(self.end)

    def replace(self, qmp: Path, command: Sequence[str], *more: str, kill: str = "self", at: int | str = 0,
                id_: str = "ram0") -> subprocess.CompletedProcess[str]:
        """Replace it; `kill` whom at which point, as in tests/e2e/killing.py."""
        words = [sys.executable, "-m", "tests.e2e.killing", kill, str(at), "--socket", self.gmemd.socket, "replace",
                 id_, "--qmp", str(qmp), *more, "--", *command]
        return subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, check=False)

    def vmms(self) -> list[int]:
        """The processes that have the object mapped, but for the test itself."""
        with self.client() as client:
            return [one["pid"] for one in client.execute("query-memdev-holders", {"id": "ram0"})
                    if one["mapped"] and one["pid"] != os.getpid()]

    def wait_settled(self) -> int:
        """Wait until the guest is not on its way any more; the process of the only VMM."""
        def idle() -> bool:
            with self.client() as client:
                try:
                    client.execute("query-command-effect", {"command": "memdev-delete",
                                                            "arguments": {"id": "ram0", "force": True}})
                except QmpError as exc:
                    return "is on its way to another VMM" not in exc.desc
                return True

        wait_for(idle)
        wait_for(lambda: len(self.vmms()) == 1)
        return self.vmms()[0]

    def status(self) -> dict[str, Any]:
        with self.client() as client:
            [found] = client.execute("query-memdev-status", {"id": "ram0"})
        return dict(found)

    def end(self) -> None:
        for pid in self.vmms():
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def linux(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[House, LinuxGuest]]:
    """A Linux guest that runs; it is the same one in all tests."""
    with ExitStack() as ends:
        guest = LinuxGuest(tmp_path_factory.mktemp("linux"))
        house = House(ends, guest.size)
        house.start(guest.command("vm"))
        guest.wait_started()
        yield house, guest


def messages(done: subprocess.CompletedProcess[str]) -> int:
    found = re.search(r"^(\d+) messages$", done.stderr, re.MULTILINE)
    assert found, done.stderr
    return int(found[1])


def test_twenty_in_a_chain(linux: tuple[House, LinuxGuest]) -> None:
    """It counts on, has not booted again, its memory is right; each QEMU is the runner in its turn."""
    house, guest = linux
    first = mark = guest.mark()
    before = house.status()["generation"]
    for _ in range(20):
        done = house.replace(guest.qmp("vm"), guest.command("vm"))
        assert done.returncode == 0, done.stderr
        [pid] = house.vmms()
        assert f"the guest runs in process {pid}, QMP socket {guest.qmp('vm')}; it was stopped for" in done.stdout
        assert house.status()["runner"]["pid"] == pid
        mark = guest.check_went_on(mark)
    guest.check_went_on(first, sums=2)
    assert house.status()["generation"] == before + 20


def test_a_killed_client_leaves_one_guest(linux: tuple[House, LinuxGuest]) -> None:
    """Killed before or after any message, from its note on: one QEMU runs the guest, the other has ended."""
    house, guest = linux
    mark = guest.mark()
    last = 2 * messages(house.replace(guest.qmp("vm"), guest.command("vm")))
    found = {"old": 0, "new": 0}
    points = sorted({last - number * (last - 2 * AFTER_THE_NOTE) // 30 for number in range(31)})
    assert len(points) >= 30
    for point in points:
        old = house.wait_settled()
        done = house.replace(guest.qmp("vm"), guest.command("vm"), at=point)
        assert done.returncode in (-signal.SIGKILL, 0), done.stderr
        pid = house.wait_settled()
        found["old" if pid == old else "new"] += 1
        mark = guest.check_went_on(mark)
        assert [path.name for path in guest.directory.glob("vm.qmp*")] == ["vm.qmp"]
    assert found["old"] > 5
    assert found["new"] > 2
    guest.check_went_on(mark, sums=1)


@pytest.mark.parametrize("at", ["-stop", "+migrate", "-memdev-handover-end"])
def test_the_daemon_may_be_killed(linux: tuple[House, LinuxGuest], at: str) -> None:
    """Before the guest is stopped, meanwhile, and before it is told the end: the guest moves, and the next knows."""
    house, guest = linux
    mark, old = guest.mark(), house.wait_settled()
    done = house.replace(guest.qmp("vm"), guest.command("vm"), kill=str(house.gmemd.daemon()), at=at)
    assert done.returncode == 0, done.stderr
    pid = house.wait_settled()
    assert pid != old
    guest.check_went_on(mark, sums=1)
    assert house.status()["runner"]["pid"] == pid


@pytest.mark.parametrize("at", ["+memdev-handover", "+stop", "-cont"])
def test_a_new_qemu_that_is_killed(linux: tuple[House, LinuxGuest], at: str) -> None:
    """Until the guest runs in it, the old one goes on, and the sentence says so; or gmemd has not taken the note."""
    house, guest = linux
    mark, old = guest.mark(), house.wait_settled()
    done = house.replace(guest.qmp("vm"), guest.command("vm"), kill="new", at=at)
    assert done.returncode == 1, done.stderr
    assert "the guest runs in the old VMM as before" in done.stderr \
        or (at == "+memdev-handover" and "has ended, or is not visible from here" in done.stderr)
    assert house.wait_settled() == old
    guest.check_went_on(mark)


def test_an_old_qemu_that_is_killed(linux: tuple[House, LinuxGuest]) -> None:
    """Once the new one has the state, it is enough."""
    house, guest = linux
    mark, old = guest.mark(), house.wait_settled()
    done = house.replace(guest.qmp("vm"), guest.command("vm"), kill=str(old), at="-cont")
    assert done.returncode == 0, done.stderr
    assert house.wait_settled() != old
    guest.check_went_on(mark, sums=1)


# -- bad input


class Firmware:
    """A guest of firmware that runs, for what must leave it as it is."""

    def __init__(self, ends: ExitStack, directory: Path) -> None:
        self.house = House(ends, FIRMWARE_SIZE)
        with self.house.client() as client:
            client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "other", "size": FIRMWARE_SIZE})
            _, [fd] = client.execute_fds("memdev-get-fd", {"id": "ram0"})
        self.guest = FirmwareGuest(directory, fd)
        os.close(fd)
        self.house.start(self.guest.command("vm"))
        self.guest.wait_runs()
        wait_for(self.guest.qmp("vm").exists)
        [self.pid] = self.house.vmms()

    @property
    def qmp(self) -> Path:
        return self.guest.qmp("vm")

    def state(self) -> object:
        """What a refused replacement must not change: processes, descriptors, sockets."""
        return (self.house.vmms(), len(os.listdir(f"/proc/{self.pid}/fd")), self.processes(),
                sorted(path.name for path in self.guest.directory.iterdir()))

    def processes(self) -> list[int]:
        """Those with the directory in their words."""
        found = []
        for name in os.listdir("/proc"):
            try:
                words = Path(f"/proc/{name}/cmdline").read_bytes() if name.isdecimal() else b""
            except OSError:
                continue
            if str(self.guest.directory).encode() in words:
                found.append(int(name))
        return found


@pytest.fixture(scope="module")
def firmware(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Firmware]:
    with ExitStack() as ends:
        yield Firmware(ends, tmp_path_factory.mktemp("firmware"))


def fake(how: str) -> list[str]:
    return [sys.executable, "-S", "-E", str(ROOT / "tests/vmm/pretender.py"), how]


def refused(firmware: Firmware, command: Sequence[str], sentence: str, *more: str, qmp: Path | None = None,
            id_: str = "ram0") -> None:
    """A replacement fails with one sentence, and the guest runs as before."""
    before = firmware.state()
    done = firmware.house.replace(qmp or firmware.qmp, command, *more, id_=id_)
    said = [line for line in done.stderr.splitlines() if not re.search(r"^  hint: |messages$", line)]
    assert (done.returncode, len(said)) == (1, 1), done.stderr
    assert re.fullmatch(f"gmemctl: {sentence}", said[0]), said[0]
    wait_for(lambda: firmware.state() == before)
    firmware.guest.wait_runs()
    firmware.house.wait_settled()


AS_BEFORE = "; the guest runs in the old VMM as before"


@pytest.mark.parametrize(("words", "sentence"), [
    (["/no/such/qemu"], r"the command ended with status 127: /no/such/qemu: No such file or directory"),
    (["false"], r"the command ended with status 1: it said nothing"),
    (["sleep", "1000", "#"], r"the command ended with status 1: sleep: .*"),
    (fake("http"), r"the VMM at '\S+' does not speak QMP: .*"),
    (fake("unversioned"), r"the VMM at '\S+' does not speak QMP: the server's greeting has no version of QEMU"),
    (fake("dies"), r"(the VMM at '\S+' has ended or closed the connection|the command ended with status 3: .*)"),
    (fake("empty"), r"the VMM at '\S+' answers 'query-status' without 'status'"),
    (fake("liar"), r"'ram0' is not memory of the VMM at '\S+' \(process \d+\)"),
])
def test_what_is_no_new_vmm(firmware: Firmware, words: list[str], sentence: str) -> None:
    """Programs that end, and programs that are something else."""
    refused(firmware, words, sentence + AS_BEFORE)


@pytest.mark.parametrize("how", ["silent", "half"])
def test_a_new_vmm_that_does_not_answer(firmware: Firmware, how: str) -> None:
    refused(firmware, fake(how), rf"the VMM at '\S+' does not answer .* within 2 s.*{AS_BEFORE}", "--timeout", "2")


def test_no_new_vmm_at_all(firmware: Firmware) -> None:
    """The process lives, but never listens."""
    command = [sys.executable, "-S", "-c", "import time; time.sleep(1000)"]
    refused(firmware, command, rf".* 2 s.*{AS_BEFORE}", "--timeout", "2")


@pytest.mark.parametrize(("words", "sentence"), [
    (["-device", "virtio-rng-pci"], r"the two VMMs are not the same machine: PCI device 00:02.0 is missing in the old "
                                    r"and device 1af4:1005 in the new one; .*"),
    (["-cpu", "max"], r"the two VMMs are not the same machine: CPU 0 is qemu64-x86_64-cpu in the old and max-.*"),
    (["-vga", "std"], r"the two VMMs are not the same machine: PCI device 00:02.0 is missing in the old and vga .*"),
    (["-smp", "2"], r"the two VMMs are not the same machine: CPU 1 is missing in the old .*"),
    (["-machine", "pc-i440fx-7.1"], r"the two VMMs are not the same machine: the machine type is pc-i440fx-7.2-.*"),
    (["-bios", "{large}"], r"the new VMM cannot take the guest: Size mismatch: pc.bios: .*"),
    (["-incoming", "tcp:127.0.0.1:1"], "the command has '-incoming tcp:127.0.0.1:1': leave it out, or write "
                                       "'-incoming defer'"),
])
def test_another_machine(firmware: Firmware, words: list[str], sentence: str) -> None:
    """What QEMU would accept, it is not given; what it does not accept, it says; the guest goes on where it was."""
    large = firmware.guest.directory / "large"
    large.write_bytes(firmware.guest.bios.read_bytes().rjust(1 << 17, b"\0"))
    command = firmware.guest.command("vm", *(word.format(large=large) for word in words))
    refused(firmware, command, sentence + ("" if "leave it out" in sentence else AS_BEFORE))


@pytest.mark.parametrize(("old", "new", "sentence"), [
    ("share=on", "share=off", r"the VMM at '\S+' \(process \d+\) has 'ram0' with share=off: .*"),
    ("id=ram,", "id=mem,", r"memory backend '\w+' exists only in the \w+ VMM: their ids must be the same .*"),
    ("mem-path={ram0}", "mem-path={zero}", r"'ram0' is not memory of the VMM at .*"),
    ("64M", "32M", r"the VMM at '\S+' \(process \d+\) has mapped 33554432 of the 67108864 bytes of 'ram0'"),
])
def test_other_memory(firmware: Firmware, old: str, new: str, sentence: str) -> None:
    zero = firmware.guest.directory / "zero"
    zero.write_bytes(b"")
    os.truncate(zero, FIRMWARE_SIZE)
    words = [word.replace(old, new).replace("{zero}", str(zero)) for word in firmware.guest.command("vm")]
    if "id=mem" in new:
        words = [word.replace("memory-backend=ram", "memory-backend=mem") for word in words]
    refused(firmware, words, sentence + AS_BEFORE)


@pytest.mark.parametrize(("how", "sentence"), [
    ("missing", r"cannot use '\S+': No such file or directory"),
    ("file", r"cannot use '\S+': Connection refused"),
    ("http", r"the VMM at '\S+' does not speak QMP: .*"),
    ("silent", r"the VMM at '\S+' does not answer as a QMP server within 2 s"),
    ("dies", r"the VMM at '\S+' has ended or closed the connection"),
    ("liar", r"the guest at '\S+' is not running \(status: inmigrate\)"),
])
def test_what_is_no_old_vmm(firmware: Firmware, tmp_path: Path, how: str, sentence: str) -> None:
    """Nothing is started."""
    path = tmp_path / "old"
    if how == "file":
        path.write_bytes(b"")
    with ExitStack() as ends:
        if how not in ("missing", "file"):
            process = ends.enter_context(subprocess.Popen([*fake(how), "-qmp", f"unix:{path}"]))
            ends.callback(process.kill)
            wait_for(path.exists)
        refused(firmware, ["false"], sentence, *(("--timeout", "2") if " 2 s" in sentence else ()), qmp=path)


def test_the_wrong_object(firmware: Firmware) -> None:
    """One that the VMM does not have; one that does not exist."""
    refused(firmware, ["false"], r"'other' is not memory of the VMM at '\S+' \(process \d+\)", id_="other")
    refused(firmware, ["false"], "object 'nope' not found", id_="nope")


def test_a_guest_that_is_stopped(firmware: Firmware) -> None:
    """It stays so."""
    with Client(firmware.qmp, timeout=PATIENCE) as monitor:
        monitor.execute("stop")
    done = firmware.house.replace(firmware.qmp, ["false"])
    assert re.match(r"gmemctl: the guest at '\S+' is not running \(status: paused\)", done.stderr), done.stderr
    with Client(firmware.qmp, timeout=PATIENCE) as monitor:
        monitor.execute("cont")
    firmware.guest.wait_runs()


def test_a_dry_run(firmware: Firmware) -> None:
    """It looks at the old VMM, and starts nothing."""
    before = firmware.state()
    done = firmware.house.replace(firmware.qmp, ["false"], "--dry-run")
    assert (done.returncode, done.stdout) == (0, f"replace would move the guest of process {firmware.pid} into a new "
                                                 "VMM, which is compared with the old one first\n"), done.stderr
    assert firmware.house.replace(firmware.qmp, ["false"], "--dry-run", "-o", "name").stdout == "ram0\n"
    assert firmware.state() == before


def test_both_killed(firmware: Firmware) -> None:
    """The guest has ended with its VMM, as the sentence says; the memory is kept, and free for the next."""
    done = firmware.house.replace(firmware.qmp, firmware.guest.command("vm"), kill=str(firmware.pid), at="-migrate")
    assert done.returncode == 1
    assert "the guest has ended with its VMM: its memory is kept, its devices' state is lost" in done.stderr
    wait_for(lambda: firmware.house.vmms() == [])
    assert "runner" not in firmware.house.status()
