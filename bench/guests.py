"""Measures of a real Linux guest under TCG: replacing its QEMU, checkpoints and forks, against QEMU's own means.

The guest is that of the tests (script/guest). When it has booted, what it has not touched of its RAM is filled with
random bytes, so the whole of it is populated: a guest does not read what it has not written. How long it stands still
is taken from QEMU's own events STOP and RESUME, which a second monitor receives.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from measure import GIB, Measure, Sample
from servers import HERE, Server, Unavailable

from gmemd.client.client import Client as Qmp
from gmemd.client.running import PATIENCE
from gmemd.errors import QmpError

_FORKS = 10
_MACHINE = "pc-q35-7.2"
_RANDOM = os.urandom(1 << 20)
_BOOTED = b"SUM 1 ok"
_BETWEEN = 2.0  # seconds that the guest runs between two checkpoints

_UNLIMITED = {"max-bandwidth": 1 << 40}  # bytes a second; QEMU's default is 128 MiB

Words = Sequence[str]


class Guest:
    """A booted guest whose RAM is object vm0 of a gmemd, all of it populated; `close` ends every QEMU of it."""

    def __init__(self, server: Server, scale: float) -> None:
        """`scale`: the part of 1 GiB that it has."""
        self.server, self.directory = server, Path(server.directory)
        self.mib = max(128, int(scale * (GIB >> 20)))
        self._console = self.directory / "console"
        self._started: list[subprocess.Popen[bytes]] = []
        self.gmemctl("create", f"memory-backend-memfd,id=vm0,size={self.mib}M,share=on")
        self.start("first", run=("exec", "vm0", "--"))
        self._wait_booted()
        self._populate()

    def command(self, name: str, *more: str, memory: str = "{vm0}", share: str = "on") -> list[str]:
        """The words of a QEMU with this RAM, a monitor `name` and a second one for us."""
        files = _files()
        ram = f"memory-backend-file,id=ram,size={self.mib}M,share={share},mem-path={memory}" if memory else \
            f"memory-backend-ram,id=ram,size={self.mib}M"
        monitors = [word for part in ("", ".events")
                    for word in ("-qmp", f"unix:{self.directory}/{name}{part},server=on,wait=off")]
        return ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-accel", "tcg,tb-size=32", "-cpu", "qemu64",
                "-m", f"{self.mib}M", "-object", ram, "-machine", f"{_MACHINE},memory-backend=ram",
                "-kernel", f"{files}/vmlinuz", "-initrd", f"{files}/initrd.gz",
                "-append", "console=ttyS0 quiet loglevel=3 tsc=unstable clocksource=acpi_pm fill=4",
                "-chardev", f"file,id=s0,path={self._console},append=on", "-serial", "chardev:s0",
                "-chardev", "null,id=s1", "-serial", "chardev:s1", *monitors, *more]

    def start(self, name: str, *more: str, run: Words = (), memory: str = "{vm0}", share: str = "on") -> None:
        """Start a QEMU, by a verb of gmemctl if given."""
        words = [*(self._gmemctl(*run) if run else ()), *self.command(name, *more, memory=memory, share=share)]
        self._started.append(subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL))

    def qmp(self, name: str) -> Qmp:
        """The monitor of that name, with ".events" the one for us."""
        return Qmp(self.directory / name, wait=PATIENCE, timeout=PATIENCE)

    def gmemctl(self, *words: str) -> None:
        """Run a verb to its end."""
        self.end(self.begin(*words))

    def begin(self, *words: str) -> subprocess.Popen[str]:
        """Run a verb."""
        return subprocess.Popen(self._gmemctl(*words), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def end(self, verb: subprocess.Popen[str]) -> None:
        """Wait for its end."""
        _, said = verb.communicate(timeout=PATIENCE)
        if verb.returncode:
            raise Unavailable(f"gmemctl: {said.strip()}")

    def free(self) -> int:
        """Memory of the host that is available; bytes. The page cache counts as available."""
        words = Path("/proc/meminfo").read_text().split()
        return int(words[words.index("MemAvailable:") + 1]) << 10

    def _gmemctl(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "gmemd.cli.gmemctl", "--socket", self.server.socket, *words]

    def _wait_booted(self) -> None:
        end = time.monotonic() + PATIENCE
        while not (self._console.exists() and _BOOTED in self._console.read_bytes()):
            if time.monotonic() > end:
                raise Unavailable("the guest does not boot")
            time.sleep(0.05)

    def _populate(self) -> None:
        """Fill the holes of its RAM with random bytes."""
        client = Qmp(self.server.socket, timeout=PATIENCE)
        _, [fd] = client.execute_fds("memdev-get-fd", {"id": "vm0"})
        client.close()
        size, at = self.mib << 20, 0
        while at < size:
            try:
                data = os.lseek(fd, at, os.SEEK_DATA)
            except OSError:  # no more data
                data = size
            while at < data:
                at += os.pwrite(fd, _RANDOM[:min(len(_RANDOM), data - at)], at)
            at = os.lseek(fd, data, os.SEEK_HOLE) if data < size else size
        os.close(fd)

    def close(self) -> None:
        for process in self._started:
            process.kill()
            process.wait()
        for qmp in self.directory.glob("*.events"):  # started by gmemctl, and not our children
            with contextlib.suppress(OSError, QmpError):
                Qmp(qmp, timeout=1).execute("quit")


def _files() -> str:
    try:
        done = subprocess.run([HERE.parent / "script/guest"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as exc:
        raise Unavailable(f"no guest: {exc}") from exc
    return done.stdout.strip()


@contextlib.contextmanager
def _guest(name: str, scale: float) -> Iterator[Guest]:
    with ExitStack() as stack:
        server = stack.enter_context(Server(name, pinned=False, on_disk=True))
        yield stack.enter_context(contextlib.closing(Guest(server, scale)))


def _time(event: dict[str, dict[str, int]]) -> float:
    """When an event was, in milliseconds."""
    return event["timestamp"]["seconds"] * 1e3 + event["timestamp"]["microseconds"] / 1e3


def _stood_still(old: Qmp, new: Qmp) -> float:
    """From the last STOP of the one to the next RESUME of the other, in milliseconds."""
    stopped = _time(old.wait_event("STOP"))
    resumed = _time(new.wait_event("RESUME"))
    return resumed - stopped


# -- replace -------------------------------------------------------------------------------------------

def stopping() -> Measure:
    """What the guest stands still for QMP's stop and cont alone; milliseconds."""

    def measure(name: str, scale: float) -> Sample:
        with _guest(name, scale) as guest, guest.qmp("first") as qmp, guest.qmp("first.events") as events:
            qmp.execute("stop")
            qmp.execute("cont")
            return Sample(_stood_still(events, events))

    return measure


def replacing() -> Measure:
    """From the old QEMU's stop to the new one's running, by `gmemctl replace`; milliseconds."""

    def measure(name: str, scale: float) -> Sample:
        with _guest(name, scale) as guest, guest.qmp("first.events") as old:
            verb = guest.begin("replace", "vm0", "--qmp", f"{guest.directory}/first", "--", *guest.command("second"))
            with guest.qmp("second.events") as new:
                guest.end(verb)
                return Sample(_stood_still(old, new))

    return measure


def migrating(*, pause: bool) -> Measure:
    """QEMU's own migration with all of the RAM to another QEMU, as fast as it can; milliseconds.

    From the command until the guest runs there, or with `pause` from its stop until then.
    """

    def measure(name: str, scale: float) -> Sample:
        with _guest(name, scale) as guest:
            guest.start("second", "-incoming", f"unix:{guest.directory}/line", memory="")
            with guest.qmp("first") as qmp, guest.qmp("first.events") as old, guest.qmp("second.events") as new:
                qmp.execute("migrate-set-parameters", _UNLIMITED)
                began = time.time() * 1e3
                qmp.execute("migrate", {"uri": f"unix:{guest.directory}/line"})
                stopped, resumed = _time(old.wait_event("STOP")), _time(new.wait_event("RESUME"))
                return Sample(resumed - (stopped if pause else began))

    return measure


# -- checkpoint ----------------------------------------------------------------------------------------

def checkpointing(*way: str) -> Measure:
    """What the guest stands still for the second of two checkpoints, with these options; milliseconds."""

    def measure(name: str, scale: float) -> Sample:
        with _guest(name, scale) as guest, guest.qmp("first.events") as events:
            for _ in range(2):
                time.sleep(_BETWEEN)
                events.take_events()
                guest.gmemctl("checkpoint", "vm0", "--qmp", f"{guest.directory}/first", *way)
            return Sample(_stood_still(events, events))

    return measure


def saving_stopped() -> Measure:
    """What the guest stands still for QEMU's own migration to a file, which has all of the RAM; milliseconds."""

    def measure(name: str, scale: float) -> Sample:
        with _guest(name, scale) as guest, guest.qmp("first") as qmp, guest.qmp("first.events") as events:
            qmp.execute("migrate-set-parameters", _UNLIMITED)
            qmp.execute("stop")
            _save(qmp, guest.directory / "saved")
            qmp.execute("cont")
            return Sample(_stood_still(events, events))

    return measure


def _save(qmp: Qmp, file: Path) -> None:
    """Write all of a stopped guest to a file."""
    qmp.execute("migrate", {"uri": f"exec:cat >{file}"})
    _wait_migrated(qmp)


def _wait_migrated(qmp: Qmp) -> None:
    while (status := qmp.execute("query-migrate").get("status")) != "completed":
        if status in ("failed", "cancelled"):
            raise Unavailable(f"QEMU's migration has {status}")
        time.sleep(0.001)


# -- fork ----------------------------------------------------------------------------------------------

def forking(*, memory: bool = False) -> Measure:
    """Time until ten guests run that go on from a checkpoint (s), or with `memory` what they occupy (MiB)."""

    def measure(name: str, scale: float) -> Sample:
        with _guest(name, scale) as guest:
            guest.gmemctl("checkpoint", "vm0", "--name", "origin", "--qmp", f"{guest.directory}/first")
            before = guest.free()
            began = time.monotonic()
            guest.gmemctl("fork", "vm0@origin", "-n", str(_FORKS), "--name", "c{n}", "--",
                          *guest.command("c{n}", memory="{vm0}", share="off"))
            taken = time.monotonic() - began
            return Sample((before - guest.free()) / 2**20 if memory else taken)

    return measure


def loading(*, memory: bool = False) -> Measure:
    """The same for ten QEMUs that each load a full save, one after the other."""

    def measure(name: str, scale: float) -> Sample:
        with _guest(name, scale) as guest:
            with guest.qmp("first") as qmp:
                qmp.execute("migrate-set-parameters", _UNLIMITED)
                qmp.execute("stop")
                _save(qmp, guest.directory / "saved")
            before = guest.free()
            began = time.monotonic()
            for number in range(_FORKS):
                guest.start(f"c{number}", "-incoming", f"exec:cat {guest.directory}/saved", memory="")
                with guest.qmp(f"c{number}") as qmp:
                    _wait_running(qmp)
            taken = time.monotonic() - began
            return Sample((before - guest.free()) / 2**20 if memory else taken)

    return measure


def _wait_running(qmp: Qmp) -> None:
    """Let the guest run when it is loaded."""
    while (status := qmp.execute("query-status")["status"]) == "inmigrate":
        time.sleep(0.001)
    if status != "running":
        qmp.execute("cont")
