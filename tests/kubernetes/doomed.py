"""A driver that is killed at a file operation of its own: python -m tests.kubernetes.doomed COUNTER ...

COUNTER is a file of two numbers: at which operation it is killed (0: at none), and how many there were. Only what
concerns claims counts: the test sets both to 0 before and after.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import sys
from typing import Any, Final

from gmemd.kubernetes.main import main

NUMBERS: Final = struct.Struct("=II")
_OPERATIONS: Final = frozenset({"open", "os.chmod", "os.chown", "os.mkdir", "os.remove", "os.rename", "os.rmdir",
                                "os.scandir", "fcntl.flock"})


def arm(path: str) -> None:
    """Count from now on, and end where the file says."""
    with open(path, "r+b") as file:
        view = mmap.mmap(file.fileno(), NUMBERS.size)

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _OPERATIONS or (event == "open" and "/claims/" not in str(arguments[0])
                                        and "/cdi/" not in str(arguments[0])):
            return
        at, count = NUMBERS.unpack(view[:])
        view[:] = NUMBERS.pack(at, count + 1)
        if at == count + 1:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


if __name__ == "__main__":
    arm(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
