"""Settling changes: one flush of custody makes everything durable that was changed in a turn of the loop."""

from __future__ import annotations

import asyncio
import select
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from gmemd.changes.steps import Ending, after
from gmemd.changes.waiting import at_once, until
from gmemd.errors import QmpError
from gmemd.observe.log import log
from gmemd.persist.nobody import AnyCustody
from gmemd.persist.waits import Flush, NotKept, Wait

if TYPE_CHECKING:
    from gmemd.backends.base import HostMemoryBackend
    from gmemd.kernel.kernel import Kernel
    from gmemd.persist.batch import Operation


class Unsettled(Protocol):
    """What is settled here: a change."""

    operations: Sequence[Operation]
    error: QmpError | None  # set when it was undone
    ending: Ending  # what the last step still waits for

    def finish(self) -> Ending:
        """Called when it is durable."""
        ...

    def revert(self) -> Ending:
        """Called when it is not."""
        ...


Waiting = list[tuple[Sequence[Unsettled], Callable[[], None]]]

_SOON: Final = 1  # millisecond; an idle manager needs a twentieth of it, and waiting on the loop takes longer
_RETRY_SECONDS: Final = 30.0


class Settler:
    """Settles changes of the objects with custody. `flushed` is called after each flush."""

    def __init__(self, kernel: Kernel, custody: AnyCustody, flushed: Callable[[], None]) -> None:
        self.kernel = kernel
        self.custody = custody
        self.not_kept = ""  # why the latest change could not be made durable; "": it was
        self._told = flushed
        self._unsettled: Waiting = []
        self._flushing = False
        self._poll, self._polled = select.poll(), -1  # of that fd

    def check_live(self, backend: HostMemoryBackend) -> None:
        """Raise QmpError for an object that no longer exists: its creation could not be made durable."""
        if not backend.lives:
            raise QmpError(f"object '{backend.id}' not found")

    def settle(self, changes: Sequence[Unsettled], settled: Callable[[], None]) -> None:
        """Have changes made durable by the next flush, shared by all requests in this turn of the loop."""
        self._unsettled.append((changes, settled))
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def durable(self) -> Awaitable[None]:
        """Wait until everything changed so far is durable or undone."""
        return self.flush() if self._flushing else at_once()

    def flush(self) -> Awaitable[None]:
        """Wait for the end of the next flush."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.settle([], lambda: None if done.done() else done.set_result(None))
        return done

    def idle(self) -> Awaitable[None]:
        """Wait until there is nothing to settle."""
        return until(lambda: not self._flushing)

    def catch_up(self) -> None:
        """Do what earlier flushes could not, now and, as long as the loop runs, periodically."""
        if self.custody.dirty:
            self.settle([], lambda: None)
        if self.custody.keeps:
            asyncio.get_running_loop().call_later(_RETRY_SECONDS, self._retry)

    def _retry(self) -> None:
        self.custody.retry()
        self.catch_up()

    def _flush(self) -> None:
        """Start a flush for all waiting changes, or stop when there is nothing to do."""
        waiting, self._unsettled = self._unsettled, []
        if not waiting and not self.custody.dirty:
            self._flushing = False
            return
        flush = self.custody.flush()
        self._drive(flush, flush.__next__, waiting)

    def _drive(self, flush: Flush, advance: Callable[[], Wait], waiting: Waiting) -> None:
        """Advance a flush to the next longer wait, or to its end."""
        try:
            wait = advance()
            while self._comes_soon(wait):
                wait = flush.send(True)
        except StopIteration:
            self._flushed(waiting, None)
            return
        except NotKept as exc:
            self._flushed(waiting, exc)
            return
        loop, fd = asyncio.get_running_loop(), wait.fd

        def resume(there: bool) -> None:
            timer.cancel()
            (loop.remove_reader if wait.what == "readable" else loop.remove_writer)(fd)
            self._drive(flush, partial(flush.send, there), waiting)

        timer = loop.call_later(wait.timeout, resume, False)
        try:
            (loop.add_reader if wait.what == "readable" else loop.add_writer)(fd, resume, True)
        except OSError as exc:
            timer.cancel()
            self._drive(flush, partial(flush.throw, exc), waiting)

    def _comes_soon(self, wait: Wait) -> bool:
        """Wait a moment here for a barrier; False: it has not passed, or the flush waits for something else.

        Waiting for room for more messages is left to the loop: a large batch does so often.
        """
        if wait.what != "readable":
            return False
        if wait.fd != self._polled:  # mostly it is the same one
            self._poll, self._polled = select.poll(), wait.fd
            self._poll.register(wait.fd, select.POLLIN)
        try:
            return len(self._poll.poll(_SOON)) > 0
        except OSError:
            return False

    def _flushed(self, waiting: Waiting, error: NotKept | None) -> None:
        """Finish the changes of a flush, undo those that did not happen, release the replies, go on."""
        if error is not None:  # what was noted meanwhile is undone with it
            waiting += self._unsettled
            self._unsettled = []
            _undo(error, [change for changes, _ in waiting for change in changes])
        for changes, _ in waiting:
            for change in changes:
                if change.error is None:
                    change.ending = change.finish()
            if changes:
                self.not_kept = "" if error is None else error.desc
        for changes, settled in waiting:
            after([change.ending for change in changes if change.ending is not None], settled)
        self._told()
        if self._unsettled or self.custody.dirty:
            asyncio.get_running_loop().call_soon(self._flush)  # others get their turn between two flushes
        else:
            self._flushing = False


def _undo(error: NotKept, changes: list[Unsettled]) -> None:
    """Undo what a flush could not make durable, the newest first."""
    log.error("not kept", desc=error.desc, undone=len(error.undone))
    by_operation = {operation: change for change in changes for operation in change.operations}
    for operation in error.undone:
        change = by_operation.get(operation)
        if change is None:
            log.error("internal error", why="an operation without a change", id=operation.record.id)
        elif change.error is None:
            change.error = error
            change.ending = change.revert()
