"""Allocate much memory: in steps, by several threads, looking at the head-room first.

Steps: one fallocate over the limit ends in an OOM kill and leaves its pages (reference, section 6). A step
of 128 MiB takes 15 to 25 ms, so that a look at the head-room (0.1 ms) costs nothing and a cancellation is
heeded at once; 16 to 256 MiB measured the same. The threads take steps from one counter, in ascending
order.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

from .base import refuse

STEP = 128 << 20  # bytes

Allocate = Callable[[int, int], None]  # offset, bytes
PolicyContext = Callable[[], AbstractContextManager[None]]


class Population:
    """One run over a range; `run` returns when all is allocated, or raises after every thread has ended."""

    def __init__(
        self,
        allocate: Allocate,
        offset: int,
        size: int,
        *,
        check: Callable[[int], None],
        progress: Callable[[int], None] | None,
        cancelled: Callable[[], bool] | None,
    ) -> None:
        self._allocate = allocate
        self._check = check
        self._progress = progress
        self._cancelled = cancelled
        self._lock = threading.Lock()
        self._next = offset
        self._end = offset + size
        self._in_flight = 0  # bytes
        self._done = 0  # bytes
        self._failure: BaseException | None = None

    def run(self, threads: int, placed: PolicyContext) -> None:
        """Allocate by so many threads, the caller's among them, each under the policy that `placed` sets."""
        steps = -(-(self._end - self._next) // STEP)
        others = [threading.Thread(target=self._work, args=(placed,)) for _ in range(min(threads, steps) - 1)]
        for thread in others:
            thread.start()
        self._work(placed)
        for thread in others:
            thread.join()
        if self._failure is not None:
            raise self._failure

    @property
    def reached(self) -> int:
        """The offset up to which steps were begun."""
        return self._next

    def _work(self, placed: PolicyContext) -> None:
        try:
            with placed():
                while step := self._begin():
                    self._allocate(*step)
                    self._finish(step[1])
        except BaseException as exc:  # carried over to the thread that called run
            with self._lock:
                self._failure = self._failure or exc

    def _begin(self) -> tuple[int, int] | None:
        """Take the next step; None when there is none or another thread failed."""
        with self._lock:
            size = min(STEP, self._end - self._next)
            if self._failure is not None or size == 0:
                return None
            if self._cancelled is not None and self._cancelled():
                raise refuse(errno.ECANCELED)
            self._check(self._in_flight + size)
            step = (self._next, size)
            self._next += size
            self._in_flight += size
            return step

    def _finish(self, size: int) -> None:
        with self._lock:
            self._in_flight -= size
            self._done += size
            if self._progress is not None:
                self._progress(self._done)


def without(ranges: list[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """Return [(offset, bytes)] of what is left of start..end when the ranges (ascending) are taken out."""
    left = []
    for offset, size in [*ranges, (end, 0)]:
        if offset >= end:
            offset = end
        if offset > start:
            left.append((start, offset - start))
        start = max(start, offset + size)
    return left
