"""A Linux guest to another version of QEMU and back: python -m tests.guests.versions QEMU; not part of CI.

QEMU is the other program, for example that of a newer Debian release in a folder (mmdebstrap), started by its loader.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from tests.e2e.test_replace import House
from tests.guests.linux import LinuxGuest


def version(qemu: str) -> str:
    """The first line of what it says of itself."""
    return subprocess.run([qemu, "--version"], capture_output=True, text=True, check=True).stdout.partition("\n")[0]


def main(other: str) -> None:
    """There, to itself, and back, twice: it counts on, has not booted again, and its memory is right."""
    with ExitStack() as ends:
        guest = LinuxGuest(Path(ends.enter_context(tempfile.TemporaryDirectory())))
        house = House(ends, guest.size)
        installed, *words = guest.command("vm")
        house.start([installed, *words])
        mark = guest.wait_started()
        for qemu in [other, other, installed, other, installed]:
            done = house.replace(guest.qmp("vm"), [qemu, *words])
            assert done.returncode == 0, done.stderr
            print(f"{version(qemu)}: {done.stdout.strip()}", flush=True)
            mark = guest.check_went_on(mark, sums=1)


if __name__ == "__main__":
    main(sys.argv[1])
