"""A lease: which process is the only writer of an object, and what happens to it when that process has ended.

A process is identified by its id and its start time (proc(5), field 22 of stat), which no other process shares. The
running daemon watches it through a pidfd; after a restart the two numbers identify it again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from gmemd.processes.identity import start_time

NEVER: Final = -1  # the start time of no process


@dataclass(eq=False)
class Lease:
    """The terms. `end` stops waiting for the holder's end, or for the object's deletion after it."""

    pid: int
    start: int  # clock ticks since boot
    uid: int
    policy: str  # "keep" or "delete": what happens to the object
    delete_after: int = 0  # seconds
    fences: bool = False  # it stops writing when it is asked to
    orphaned: bool = False
    end: Callable[[], None] = lambda: None
    fence: str = ""  # which fence waits for its answer; "": none
    answer: Callable[[str | None], None] = lambda error: None  # takes it; None: it does not write

    def is_of(self, pid: int) -> bool:
        """Is that living process the holder? OSError as for start_time."""
        return not self.orphaned and pid == self.pid and start_time(pid) == self.start

    def dump(self) -> list[Any]:
        """The arguments that recreate it: Lease(*dump)."""
        return [self.pid, self.start, self.uid, self.policy, self.delete_after, self.fences]

    def describe(self) -> dict[str, Any]:
        """Its members in query-memdev-leases."""
        terms = {"delete-after": self.delete_after} if self.policy == "delete" else {}
        return {"pid": self.pid, "uid": self.uid, "policy": self.policy, **terms, "fences": self.fences,
                "orphaned": self.orphaned}
