"""What was written to an object, as far as the processes that write it have handed their userfaultfds over.

Time is cut into epochs: looking ends one. A mark is the number of an epoch; "since a mark" is what was written in that
epoch and later ones, so any number of users can each remember their own. Old epochs are merged, which can only make
"since" more than it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from itertools import count
from typing import Any, Final

from gmemd.errors import close_fd
from gmemd.memory.ranges import RangeMap

_EPOCHS: Final = 16  # that are kept apart

_numbers = count(1)  # of epochs: a mark of what no longer is tracked is never one of what is

Runs = Iterable[tuple[int, int]]  # offset, bytes


@dataclass(eq=False)
class Tracker:
    """A process whose writes through one mapping are tracked; owns both descriptors."""

    pid: int
    start: int  # clock ticks since boot
    address: int
    fd: int  # its userfaultfd
    pagemap: int
    end: Callable[[], None] = lambda: None  # ends the watch for its end

    def close(self) -> None:
        """Write protection may remain where the process has a copy of its userfaultfd; it does no harm."""
        self.end()
        close_fd(self.fd)
        close_fd(self.pagemap)


class Tracking:
    """The trackers of one object, and what they have found; `size` in bytes."""

    def __init__(self, size: int, handed_out: int, lock: AbstractAsyncContextManager[Any]) -> None:
        self.lock = lock  # held while it is found out what was written
        self.trackers: tuple[Tracker, ...] = ()
        self.now = next(_numbers)  # the epoch
        self._first = self.now  # the oldest mark since which everything is known
        self._handed_out = handed_out
        self._size = size
        self._sets: list[tuple[int, RangeMap]] = []  # (epoch, what was written in it), ascending

    def wrote(self, runs: Runs) -> None:
        """Add to the current epoch."""
        if not self._sets or self._sets[-1][0] != self.now:
            self._sets.append((self.now, RangeMap(self._size, False)))
        current = self._sets[-1][1]
        for offset, size in runs:
            current.set(offset, size, True)

    def turn(self) -> int:
        """End the epoch: the mark for what comes next."""
        if len(self._sets) > _EPOCHS:
            (_, older), (epoch, newer) = self._sets[:2]
            self._sets[:2] = [(epoch, _union([older, newer], self._size))]
        self.now = next(_numbers)
        return self.now

    def forget(self) -> int:
        """What was written until now is not known; the mark from which on it is."""
        self._sets.clear()
        self.now = next(_numbers)
        self._first = self.now
        return self.now

    def since(self, mark: int) -> list[tuple[int, int]] | None:
        """What was written since a mark, ascending; None: that is not known."""
        if not self._first <= mark <= self.now:
            return None
        found = _union([written for epoch, written in self._sets if epoch >= mark], self._size)
        return [(offset, size) for offset, size, state in found.ranges() if state]

    def close(self) -> None:
        """End all of it."""
        for tracker in self.trackers:
            tracker.close()

    def is_handed_out(self, times: int) -> bool:
        """Whether others may have got the memory since this was asked last; `times`: how often it was handed out."""
        before, self._handed_out = self._handed_out, times
        return times != before


def _union(sets: list[RangeMap], size: int) -> RangeMap:
    union = sets[0].copy() if sets else RangeMap(size, False)
    for one in sets[1:]:
        for offset, length, state in one.ranges():
            if state:
                union.set(offset, length, True)
    return union
