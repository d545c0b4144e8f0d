"""The identity of a process: an id alone may be reused."""

from __future__ import annotations

import contextlib
from typing import Final

PROC: Final = "/proc"

_UNITS: Final = (".service", ".scope", ".socket", ".mount", ".swap")  # systemd.unit(5), those with processes


def start_time(pid: int, proc: str = PROC) -> int | None:
    """When a process started, in clock ticks since boot; None when it has ended or is not visible from here.

    OSError when that cannot be found out: for lack of descriptors a living process must not be taken for dead.
    """
    try:
        fields = read(f"{proc}/{pid}/stat").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def command_name(pid: int) -> str:
    """The name of a process, for messages; "?" when it cannot be read."""
    return describe(pid).get("comm", "?")


def describe(pid: int) -> dict[str, str]:
    """The name (comm), control group (cgroup) and systemd unit of a process, as far as they can be read."""
    found = {}
    with contextlib.suppress(OSError):
        found["comm"] = read(f"{PROC}/{pid}/comm").rstrip("\n")
    group = cgroup_of(f"{PROC}/{pid}")
    if group is not None:
        found["cgroup"] = group
        unit = next((part for part in reversed(group.split("/")) if part.endswith(_UNITS)), None)
        if unit is not None:
            found["unit"] = unit
    return found


def system_unit(cgroup: str) -> str | None:
    """The systemd unit of a control group, as the system's manager sees it: a user's manager can name groups below its
    own like any unit of the system."""
    return next((part for part in cgroup.split("/") if part.endswith(_UNITS)), None)


def cgroup_of(place: str) -> str | None:
    """The control group of the process at /proc/PID: the unified one, or that of the memory controller."""
    try:
        lines = read(f"{place}/cgroup").splitlines()
    except OSError:
        return None
    groups = {kind: path for _, kind, path in (line.split(":", 2) for line in lines)}
    return groups.get("") or groups.get("memory")


def read(path: str) -> str:
    """The text of a file of /proc, whatever bytes a process has put there."""
    with open(path, errors="backslashreplace") as file:
        return file.read()
