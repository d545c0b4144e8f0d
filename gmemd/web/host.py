"""The host's memory, and the lag of the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from time import monotonic
from typing import Final

from gmemd.changes.threads import in_thread
from gmemd.kernel.headroom import Headroom
from gmemd.kernel.hugepages import HugePool
from gmemd.kernel.kernel import Kernel

FRESH: Final = 1.0  # seconds that a reading is valid
LAG_PERIOD: Final = 0.25  # seconds between two readings of the clock
LAG_WINDOW: Final = 60.0  # seconds over which the longest lag is reported


@dataclass(frozen=True)
class Host:
    """One reading. None: unknown."""

    headroom: Headroom | None
    pools: tuple[HugePool, ...]


class HostReader:
    """Reads the host's memory in a worker thread, once for all requests within a second."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._host = Host(None, ())
        self._when = -FRESH
        self._lock = asyncio.Lock()

    async def read(self) -> Host:
        async with self._lock:
            if monotonic() - self._when >= FRESH:
                self._host = await in_thread(self._read)
                self._when = monotonic()
        return self._host

    def _read(self) -> Host:
        try:
            headroom = self._kernel.headroom()
        except OSError:
            headroom = None
        try:
            return Host(headroom, tuple(self._kernel.huge_pools()))
        except (OSError, ValueError):
            return Host(headroom, ())


class Lag:
    """The longest delay of anything due on the event loop within the last minute."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._found: deque[float] = deque(maxlen=round(LAG_WINDOW / LAG_PERIOD))
        self._plan()

    def _plan(self) -> None:
        self._due = self._loop.time() + LAG_PERIOD
        self._timer = self._loop.call_at(self._due, self._look)

    def _look(self) -> None:
        self._found.append(max(0.0, self._loop.time() - self._due))
        self._plan()

    @property
    def longest(self) -> float:
        """In seconds."""
        return max(self._found, default=0.0)

    def close(self) -> None:
        self._timer.cancel()
