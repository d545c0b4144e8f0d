"""What a process has written to its private mappings of a file, and so has copies of (smaps in proc(5))."""

from __future__ import annotations

from gmemd.processes.holders import Shown
from gmemd.processes.identity import PROC


def written(pid: int, file: Shown, proc: str = PROC) -> int | None:
    """The bytes; None if the process has ended or may not be inspected. Takes long; for a thread."""
    found, ours = 0, False
    try:
        with open(f"{proc}/{pid}/smaps", errors="replace") as lines:
            for line in lines:
                first, *rest = line.split(None, 5)
                if first == "Anonymous:":
                    found += int(rest[0]) << 10 if ours else 0
                elif not first.endswith(":"):
                    ours = (rest[2], rest[3]) == file[:2]
    except OSError:
        return None
    return found
