"""Long work in short turns; in between, the event loop serves others."""

from __future__ import annotations

import asyncio
from time import perf_counter
from typing import Final

TURN: Final = 100e-6  # seconds


class Pace:
    """The pace of one task."""

    def __init__(self) -> None:
        self._began = perf_counter()

    async def keep(self) -> None:
        """Let others go first if this turn has been long enough."""
        if perf_counter() - self._began >= TURN:
            await asyncio.sleep(0)
            self._began = perf_counter()
