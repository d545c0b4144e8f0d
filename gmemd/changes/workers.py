"""Room for worker processes: a few per CPU at a time, however many are requested; the rest wait in line."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import AsyncIterator
from typing import Final

from gmemd.changes.jobs import CANCELLED, Job
from gmemd.errors import QmpError

_A_CPU: Final = 2  # processes


class Workers:
    """A limited number at a time, first come, first served."""

    def __init__(self, most: int) -> None:
        self._free = most
        self._line: deque[asyncio.Future[bool]] = deque()  # True: its turn; False: no need to wait any more

    @contextlib.asynccontextmanager
    async def room(self, job: Job | None) -> AsyncIterator[None]:
        """Wait for room for one, and hold it; QmpError when the job is cancelled meanwhile."""
        if self._free:
            self._free -= 1
        elif not await self._turn(job):
            raise QmpError(CANCELLED)
        try:
            yield
        finally:
            self._leave()

    async def _turn(self, job: Job | None) -> bool:
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def give_up() -> None:
            if not turn.done():
                turn.set_result(False)

        if job is not None:
            job.interrupt = give_up
            if job.cancelled:
                return False
        self._line.append(turn)
        try:
            return await turn
        except asyncio.CancelledError:  # the daemon ends
            if turn.done() and not turn.cancelled() and turn.result():
                self._leave()
            raise

    def _leave(self) -> None:
        while self._line:
            turn = self._line.popleft()
            if not turn.done():
                turn.set_result(True)
                return
        self._free += 1


workers: Final = Workers(_A_CPU * len(os.sched_getaffinity(0)))  # of this process
