"""What all fences have in common: the note, the deadline, and how one is held and released.

A fence keeps an object's memory from being written while it is copied. States: chosen, held, released.
What it will stop is noted in the object's record before it stops anything, and the note goes when all of it goes on
again. If the daemon is killed in between, the guard lets go on what is noted, and if that was killed, too, the next
daemon does (`commands.fences.recover`).

At the deadline whoever was stopped goes on, and the copy fails: `release` raises.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from time import monotonic
from typing import Any, ClassVar

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.change import Change
from gmemd.commands.context import Gmemd
from gmemd.commands.guarding import Guard
from gmemd.commands.holders import writers_now
from gmemd.errors import QmpError
from gmemd.processes.holders import Holder
from gmemd.processes.identity import start_time


class Fence:
    """One fence, for one object, to be held once. `lost` is called if it ends before it is released."""

    via: str  # as in MemdevFenceVia; of auto, known once it is held
    consistent = True
    guarded: ClassVar[bool] = False  # it stops others, and a guard is to let go on them
    protect: dict[str, int] | None = None  # for the reader, instead of a guest that stands still: `snapshots.protected`

    def __init__(self, gmemd: Gmemd, backend: HostMemoryBackend, deadline: int) -> None:
        """deadline: milliseconds, from when it begins to stop others."""
        self.lost: Callable[[], None] = lambda: None
        self.pause = 0.0  # seconds for which others stood still, once it is released
        self.gmemd = gmemd
        self.backend = backend
        self.deadline = deadline
        self._error: QmpError | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._handed_out = -1
        self._began = 0.0
        self._ending: asyncio.Task[None] | None = None
        self._guard: Guard | None = None

    async def hold(self) -> None:
        """Return when nobody writes the memory any more; QmpError: that failed, and everybody goes on."""
        if self.backend.fence is not None:
            raise QmpError(f"object '{self.backend.id}' is fenced already, by '{self.backend.fence['via']}'")
        self.backend.fence = {"via": self.via}
        self._handed_out = self.backend.handed_out
        try:
            stopped = await self.prepare()
            await self.note(stopped)
            if self.guarded:
                self._guard = await Guard.start(stopped, self.deadline)
            await self.approach()
            self._began = monotonic()
            await self.stop(self._began + self.deadline / 1000)
        except BaseException:
            await self._end()
            raise
        left = self._began + self.deadline / 1000 - monotonic()
        self._timer = asyncio.get_running_loop().call_later(max(left, 0), self._overdue)

    async def release(self) -> None:
        """Let everybody go on; QmpError: somebody may have written meanwhile."""
        if self.backend.handed_out != self._handed_out:
            self._fail(f"object '{self.backend.id}' was handed out while it was fenced")
        await self._end()
        if self._error is not None:
            raise self._error

    async def stay(self) -> None:
        """Keep everybody from going on, at whatever deadline, until `release` or for good; then call `drop`.

        For memory that is given away. QmpError: somebody may have written meanwhile. If the daemon is killed now, the
        next one does what the object's record says.
        """
        if self._timer is not None:
            self._timer.cancel()
        await self._dismiss()
        await self.still()
        if self.backend.handed_out != self._handed_out:
            self._fail(f"object '{self.backend.id}' was handed out while it was fenced")
        if self._error is not None:
            raise self._error

    # -- what each kind does ---------------------------------------------------------------------

    async def prepare(self) -> dict[str, Any]:
        """Find out what must be stopped, or refuse; what the note says of it, for `recover`."""
        return {}

    async def approach(self) -> None:
        """What takes long and stops nobody; it is noted already what will be stopped."""

    async def stop(self, until: float) -> None:
        """Stop it, by then (monotonic seconds)."""

    async def go(self) -> None:
        """Let go on what `stop` has stopped, however far it came; QmpError: it was not still all the time."""

    async def still(self) -> None:
        """QmpError: what was stopped was not still all the time."""

    async def drop(self) -> None:
        """Leave what was stopped as it is, after `stay`."""

    # -- for these ---------------------------------------------------------------------------------

    async def holders(self) -> list[Holder]:
        """The processes that can write the memory now, but for gmemd's own and the service manager."""
        return await writers_now(self.gmemd, self.backend)

    async def to_stop(self) -> set[int]:
        """Their pids; QmpError if one is another user's than the client's: gmemd may stop more than its client may."""
        found = await self.holders()
        if not self.gmemd.sees_all:
            for holder in found:
                if self.gmemd.made is not None:
                    raise QmpError(f"process {holder.pid} holds the memory of '{self.backend.id}', and for a client of"
                                   " a made room nobody is stopped")
                if str(holder.uid) != self.gmemd.tenant:
                    raise QmpError(f"process {holder.pid}, which is another user's, holds the memory of "
                                   f"'{self.backend.id}'")
        return {holder.pid for holder in found}

    async def note(self, stopped: dict[str, Any] | None) -> None:
        """Make the record of a kept object say what will be stopped; None: nothing is any more."""
        before = self.backend.fence
        self.backend.fence = None if stopped is None else {"via": self.via, **stopped}
        if stopped is not None and self._guard is not None:
            self._guard.tell(stopped)
        if self.backend.record is not None and (stopped or (before and len(before) > 1)):
            change = Change(self.gmemd.settler)
            change.rewrite(self.backend)
            await change.settle()

    def _fail(self, words: str) -> None:
        self._error = self._error or QmpError(words)

    def _overdue(self) -> None:
        self._fail(f"the deadline of {self.deadline} ms has passed: '{self.backend.id}' is no longer fenced")
        self._ending = self._ending or asyncio.get_running_loop().create_task(self._let_go())
        self.lost()

    async def _end(self) -> None:
        """Let everybody go on, once, whoever asks for it and is cancelled meanwhile."""
        if self._ending is None:
            self._ending = asyncio.get_running_loop().create_task(self._let_go())
        await uninterrupted(self._ending)

    async def _let_go(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        try:
            await self.go()
        except QmpError as exc:
            self._fail(exc.desc)
        if self._began:
            self.pause = monotonic() - self._began
        await self._dismiss()
        try:
            await self.note(None)
        except QmpError as exc:
            self._fail(exc.desc)

    async def _dismiss(self) -> None:
        guard, self._guard = self._guard, None
        if guard is not None:
            await guard.end()


@contextlib.asynccontextmanager
async def held(fence: Fence) -> AsyncIterator[Fence]:
    """Hold a fence during the block, whose own error goes before that of releasing it."""
    await fence.hold()
    try:
        yield fence
    except BaseException:
        with contextlib.suppress(QmpError):
            await fence.release()
        raise
    await fence.release()


async def uninterrupted(work: Awaitable[Any]) -> Any:
    """Wait for work that must not be left in the middle; a cancellation is raised when it is done."""
    task, cancelled = asyncio.ensure_future(work), False
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError
    return task.result()


def identity(pid: int) -> list[int] | None:
    """A process as a note names it, [pid, start]; None: it has ended."""
    start = start_time(pid)
    return None if start is None else [pid, start]
