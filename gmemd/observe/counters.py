"""Plain counts of what the core has done; web/prometheus.py makes metrics of them on request.

Counting a command (server/ledger.py) costs one dictionary look-up and a few additions; nothing is imported or allocated
for it. Only the schema's names are counted separately, so no client can make the tables grow.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container, Iterable
from time import perf_counter
from typing import Final

clock: Final = perf_counter  # seconds; the clock for durations
QUICK: Final = 50e-6  # seconds
BOUNDS: Final[tuple[float, ...]] = (  # seconds, upper bounds of buckets
    QUICK, 200e-6, 1e-3, 5e-3, 25e-3, 100e-3, 500e-3, 2.5, 10.0)
OTHER: Final = "other"  # what is not a command of the schema, or not a well-formed message


class Durations:
    """How long commands of one kind took, as a histogram."""

    __slots__ = ("quick", "seconds", "slow")

    def __init__(self) -> None:
        self.quick = 0  # in the first bucket: nearly all
        self.slow = [0] * len(BOUNDS)  # in the others; the last has no bound
        self.seconds = 0.0  # sum

    def add_slow(self, seconds: float) -> None:
        """Count one that took longer than QUICK."""
        self.slow[bisect_left(BOUNDS, seconds) - 1] += 1

    @property
    def counts(self) -> list[int]:
        """How many by bucket, not cumulative."""
        return [self.quick, *self.slow]


class Tally:
    """How often a command was answered, and where its durations go."""

    __slots__ = ("durations", "failed", "succeeded")

    def __init__(self, durations: Durations) -> None:
        self.durations = durations
        self.succeeded = 0
        self.failed = 0


class Counters:
    """Everything that is counted."""

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
