"""A real Linux guest in QEMU under TCG: it counts, checks its memory, and can be asked whether it has gone on.

    guest = LinuxGuest(tmp_path)
    subprocess.Popen(gmemctl("--socket", ..., "exec", "ram0", "--", *guest.command("first")))
    guest.wait_started()
    mark = guest.mark()       # where its output is now
    ...                       # move it to another QEMU, with guest.command("second", "-incoming", "defer")
    guest.check_went_on(mark)

All QEMUs of a guest append to one file of its serial console. The guest is created by script/guest; its output is
described in tests/guests/init.
"""

from __future__ import annotations

import re
import socket
import subprocess
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.patience import PATIENCE, wait_for
from tests.programs import ROOT, needs

SIZE = 128 << 20  # bytes of its RAM
MACHINE = "pc-q35-7.2"

_LINE = re.compile(r"(?:C|SUM) (\d+) (?:(ok|BAD) )?boot=([0-9a-f]{8})")

needs_qemu = needs("qemu-system-x86_64")


@cache
def files() -> Path:
    """The directory with vmlinuz and initrd.gz."""
    done = subprocess.run([str(ROOT / "script/guest")], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"script/guest: {done.stderr}")
    return Path(done.stdout.strip())


class Mark(NamedTuple):
    """A moment of a guest."""

    boot: str  # its boot id
    count: int  # its counter
    at: int  # bytes of its output
    cut: bool = False  # in the middle of a line


class LinuxGuest:
    """One guest, in whichever QEMU it runs; its files are in `directory`."""

    def __init__(self, directory: Path, *, size: int = SIZE, fill: int = 4) -> None:
        """`size`: bytes of RAM. `fill`: MiB that it writes and checks."""
        self.directory = directory
        self.size = size
        self.output = directory / "console"
        self._fill = fill

    def qmp(self, name: str) -> Path:
        """The QMP socket of the QEMU of that name."""
        return self.directory / f"{name}.qmp"

    def command(self, name: str, *more: str, memory: str = "{ram0}", share: str = "on", backend: str = "",
                machine: str = MACHINE, console: Path | None = None) -> list[str]:
        """The words of a QEMU with its RAM in the file `memory`, or in the object `backend` with the id ram."""
        mib = self.size >> 20
        backend = backend or f"memory-backend-file,id=ram,size={mib}M,share={share},mem-path={memory}"
        return ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-vga", "none",
                "-accel", "tcg,tb-size=32", "-cpu", "qemu64", "-machine", f"{machine},memory-backend=ram",
                "-m", self._memory_option(more), "-object", backend,
                "-kernel", str(files() / "vmlinuz"), "-initrd", str(files() / "initrd.gz"),
                "-append", "console=ttyS0 quiet loglevel=3 panic=5 tsc=unstable clocksource=acpi_pm "
                           f"memhp_default_state=online_movable fill={self._fill}",
                "-chardev", f"file,id=s0,path={console or self.output},append=on", "-serial", "chardev:s0",
                "-chardev", f"socket,id=s1,path={self._shell(name)},server=on,wait=off", "-serial", "chardev:s1",
                "-qmp", f"unix:{self.qmp(name)},server=on,wait=off", *_without_m(more)]

    def _memory_option(self, more: tuple[str, ...]) -> str:
        return more[more.index("-m") + 1] if "-m" in more else f"{self.size >> 20}M"

    def _shell(self, name: str) -> Path:
        return self.directory / f"{name}.shell"

    # -- what it says

    def mark(self, console: Path | None = None) -> Mark:
        """Where it is now; it must have counted."""
        text = self._text(console)
        text = text[:text.rfind("\n") + 1]  # without the line that it is writing
        counted = [found for found in _LINE.finditer(text) if found[0].startswith("C")]
        assert counted, f"the guest has not counted yet: {text[-500:]!r}"
        return Mark(counted[-1][3], int(counted[-1][1]), len(text), not text.endswith("\n"))

    def wait_started(self, console: Path | None = None) -> Mark:
        """Wait until it has booted, counts, and has checked its memory once."""
        wait_for(lambda: re.search(r"SUM \d+ ok", self._text(console)))
        return self.mark(console)

    def check_went_on(self, mark: Mark, *, sums: int = 0, console: Path | None = None) -> Mark:
        """Wait for counters, and for `sums` checks of its memory, after a moment; assert that nothing is lost."""
        def new() -> list[re.Match[str]]:
            return list(_LINE.finditer(self._text(console), mark.at))

        wait_for(lambda: sum(line[0].startswith("C") for line in new()) > 1
                 and sum(line[0].startswith("SUM") for line in new()) >= sums)
        counts = [int(line[1]) for line in new() if line[0].startswith("C")]
        assert {line[3] for line in new()} == {mark.boot}, "it has booted again"
        next_ = mark.count + 1 + mark.cut  # the line that the mark cuts is not found
        assert mark.count <= counts[0] <= next_, f"it counted from {mark.count} to {counts[0]}"
        assert counts == list(range(counts[0], counts[0] + len(counts)))
        assert not [line for line in new() if line[2] == "BAD"], "its memory has changed"
        return self.mark(console)

    def is_quiet(self, seconds: float = 0.5, console: Path | None = None) -> bool:
        """Whether it says nothing for a while: it is stopped, or gone."""
        before = len(self._text(console))
        time.sleep(seconds)
        return len(self._text(console)) == before

    def run(self, name: str, command: str) -> str:
        """Run a command in its shell, in the QEMU of that name; its output."""
        with socket.socket(socket.AF_UNIX) as shell:
            shell.settimeout(PATIENCE)
            shell.connect(str(self._shell(name)))
            shell.sendall(f"\n{command}\necho E''ND\n".encode())
            found = b""
            while b"END" not in found:
                part = shell.recv(1 << 16)
                assert part, f"the shell of {name} is closed: {found!r}"
                found += part
        return found.decode().replace("\r", "").rpartition("END")[0].strip()

    def _text(self, console: Path | None = None) -> str:
        path = console or self.output
        return path.read_bytes().decode("ascii", "replace").replace("\r", "\n") if path.exists() else ""


def _without_m(words: tuple[str, ...]) -> tuple[str, ...]:
    if "-m" not in words:
        return words
    at = words.index("-m")
    return words[:at] + words[at + 2:]
