"""Plain counts of what the core has done; web/prometheus.py makes metrics of them on request.

Counting a command costs one dictionary look-up and a few additions; nothing is imported or allocated for it. Only the
schema's names are counted separately, so no client can make the tables grow.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Iterable
from dataclasses import dataclass
from time import perf_counter
from typing import Final

clock: Final = perf_counter  # seconds; the clock for durations
BOUNDS: Final = (50e-6, 200e-6, 1e-3, 5e-3, 25e-3, 100e-3, 500e-3, 2.5, 10.0)  # seconds, upper bounds of buckets
OTHER: Final = "other"  # what is not a command of the schema, or not a well-formed message


class Durations:
    """How long commands of one kind took, as a histogram."""

    __slots__ = ("counts", "seconds")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)  # by bucket, not cumulative; the last has no bound
        self.seconds = 0.0  # sum


@dataclass(slots=True, eq=False)
class Tally:
    """How often a command was answered, and where its durations go."""

    durations: Durations
    succeeded: int = 0
    failed: int = 0


class Counters:
    """Everything that is counted; commands and durations change through `count` only, the rest is incremented."""

    def __init__(self, commands: Iterable[str], reading: Container[str]) -> None:
        """`reading`: those of the commands that only read."""
        self.queries = Durations()  # commands that only read
        self.changes = Durations()  # the others, until they are durable
        self.commands = {name: Tally(self.queries if name in reading else self.changes) for name in commands}
        self.other = self.commands[OTHER] = Tally(self.queries)
        self.connections = 0  # accepted since start
        self.fds_sent = 0
        self.conversions = {"private": 0, "shared": 0}
        self.converted_bytes = {"private": 0, "shared": 0}
        self.restored = 0  # objects restored at start
        self.events: dict[str, int] = {}

    def count(self, command: str, began: float, ok: bool) -> float:
        """Count an answered command that began at `clock()` time `began`; the time now."""
        tally = self.commands.get(command) or self.other
        if ok:
            tally.succeeded += 1
        else:
            tally.failed += 1
        now = clock()
        seconds = now - began
        durations = tally.durations
        durations.seconds += seconds
        durations.counts[bisect_left(BOUNDS, seconds) if seconds > BOUNDS[0] else 0] += 1
        return now
