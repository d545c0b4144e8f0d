"""Who a process is: an id alone may be given again."""

from __future__ import annotations

PROC = "/proc"


def start_time(pid: int, proc: str = PROC) -> int | None:
    """When a process began, in clock ticks since boot; None when it has ended or cannot be seen from here.

    OSError when that cannot be told: whoever is short of descriptors must not take the living for dead.
    """
    try:
        with open(f"{proc}/{pid}/stat", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def command_name(pid: int, proc: str = PROC) -> str:
    """The name of a process for people; "?" when it cannot be read."""
    try:
        with open(f"{proc}/{pid}/comm", errors="backslashreplace") as file:
            return file.read().rstrip("\n")
    except OSError:
        return "?"
