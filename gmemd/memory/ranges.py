"""Which parts of an object are private and which shared: a map of ranges, not of pages.

The map is the ascending list of the offsets where the state changes; before the first one, the state is the initial
one. A 1 TiB object with ten thousand ranges costs a few hundred KiB.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Any

from gmemd.kernel.rules import PAGE_SIZE

PRIVATE = True
SHARED = False


class RangeMap:
    """The visibility of each byte of `size` bytes: PRIVATE or SHARED."""

    __slots__ = ("_changes", "initial", "size")

    def __init__(self, size: int, initial: bool, changes: list[int] | None = None) -> None:
        self.size = size
        self.initial = initial  # the state that the object started with
        self._changes = changes or []

    @classmethod
    def of(cls, size: int, dumped: Any) -> RangeMap | None:
        """The map of [initial, *dump()] that somebody else has written; None: that is none."""
        initial, *changes = dumped if isinstance(dumped, list) and dumped else [None]
        inside = all([type(at) is int and 0 <= at < size and at % PAGE_SIZE == 0 for at in changes])
        if type(initial) is not bool or not inside or changes != sorted(set(changes)):
            return None
        return cls(size, initial, changes)

    def at(self, offset: int) -> bool:
        """The state of the byte at `offset`."""
        return self.initial ^ bool(bisect_right(self._changes, offset) & 1)

    def set(self, offset: int, size: int, state: bool) -> None:
        """Set the state of a range inside the object."""
        changes, end = self._changes, offset + size
        first, last = bisect_left(changes, offset), bisect_right(changes, end)
        new = []
        if (self.initial ^ bool(first & 1)) != state:
            new.append(offset)
        if end < self.size and (self.initial ^ bool(last & 1)) != state:
            new.append(end)
        changes[first:last] = new

    def ranges(self, offset: int = 0, size: int | None = None) -> Iterator[tuple[int, int, bool]]:
        """(offset, size, state) of each range that overlaps the given part, cut to it, ascending."""
        end = self.size if size is None else offset + size
        index = bisect_right(self._changes, offset)
        while offset < end:
            until = min(end, self._changes[index] if index < len(self._changes) else end)
            yield offset, until - offset, self.initial ^ bool(index & 1)
            offset, index = until, index + 1

    def total(self, state: bool) -> int:
        """How many bytes have this state."""
        changes = self._changes
        other = sum(changes[1::2]) - sum(changes[::2]) + (self.size if len(changes) & 1 else 0)
        return other if state != self.initial else self.size - other

    def __len__(self) -> int:
        """The number of ranges."""
        return len(self._changes) + (not self._changes or self._changes[0] > 0)

    def to_json(self) -> list[int]:
        """The initial state, then the changes."""
        return [self.initial, *self._changes]

    def copy(self) -> RangeMap:
        """A copy, which later changes do not affect."""
        return RangeMap(self.size, self.initial, list(self._changes))

    def dump(self) -> list[int]:
        """What the constructor needs to recreate this map, besides size and initial state."""
        return list(self._changes)
