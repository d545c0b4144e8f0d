"""Who runs a guest on an object, and the note that its guest is on its way from one VMM to another.

Processes are identified as in a lease, by id and start time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gmemd.processes.identity import start_time


@dataclass(eq=False)
class Runner:
    """The process that runs a guest on an object. `end` stops waiting for its end."""

    pid: int
    start: int  # clock ticks since boot
    uid: int
    end: Callable[[], None] = lambda: None

    def is_(self, pid: int, start: int | None) -> bool:
        """Whether it is that process."""
        return (self.pid, self.start) == (pid, start)

    def lives(self) -> bool:
        """Whether it has not ended. OSError as for start_time."""
        return start_time(self.pid) == self.start

    def dump(self) -> list[int]:
        """The arguments that recreate it: Runner(*dump)."""
        return [self.pid, self.start, self.uid]


class Side(NamedTuple):
    """A VMM of a handover."""

    pid: int
    start: int  # clock ticks since boot
    uid: int
    qmp: str  # the path of its QMP socket
    root: str = ""  # the directory of the policy that it is below; "": there was none


@dataclass(eq=False)
class Handover:
    """A guest on its way, noted by each of its objects. `end` stops waiting for the client's end."""

    ids: tuple[str, ...]
    client: tuple[int, int]  # the process that moves it, and its start
    old: Side
    new: Side
    trouble: str = ""  # why gmemd cannot bring it to an end after the client's death
    end: Callable[[], None] = field(default=lambda: None)

    @property
    def doing(self) -> str:
        """What is happening, as the reason in refusals."""
        return "its guest is on its way to another VMM" + (f" ({self.trouble})" if self.trouble else "")

    def dump(self) -> list[Any]:
        """The argument that recreates it: Handover.load(dump)."""
        return [list(self.ids), list(self.client), list(self.old), list(self.new)]

    @classmethod
    def load(cls, dump: list[Any]) -> Handover:
        ids, client, old, new = dump
        return cls(tuple(ids), tuple(client), Side(*old), Side(*new))
