"""Allocate much memory: in steps, by several threads, looking at the head-room first.

Why in steps: one fallocate over the limit ends in an OOM kill and leaves its pages (reference, section 6).
A step of 128 MiB takes 15 to 25 ms, so a look at the head-room (0.1 ms) costs nothing and a cancellation is
heeded at once; 16 to 256 MiB measured the same. The threads take steps from one counter, in ascending
order, so what was begun is one range.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Final

from .base import refuse

STEP: Final = 128 << 20  # bytes
UNIT: Final = 2 << 20  # bytes; small objects are shared among the threads in multiples of this

Allocate = Callable[[int, int], None]  # offset, bytes
PolicyContext = Callable[[], AbstractContextManager[None]]


def shared_among(size: int, threads: int, unit: int, cpus: int) -> tuple[int, int]:
    """Return how many threads to use and the bytes of a step, a multiple of unit.

    More threads than CPUs gain nothing, and a client may ask for 2^32 - 1.
    """
    threads = max(1, min(threads, cpus))
    share = -(-size // threads)
    step = max(unit, min(STEP, share) // unit * unit)
    return min(threads, -(-size // step)), step


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
        self._end = offset + size
        self._size = size
        self._step = STEP
        self._in_flight = 0  # bytes
        self._done = 0  # bytes
        self._failure: BaseException | None = None
        self.reached = offset  # up to here steps were begun

    def run(self, threads: int, placed: PolicyContext, unit: int = UNIT) -> None:
        """Allocate by so many threads, the caller's among them, each under the policy that `placed` sets.

        unit is the least that can be allocated and given back: a huge page may be larger than UNIT.
        """
        cpus = len(os.sched_getaffinity(0))
        count, self._step = shared_among(self._size, threads, max(unit, UNIT), cpus)
        others = [threading.Thread(target=self._work, args=(placed,)) for _ in range(count - 1)]
        started = []
        try:
            for thread in others:
                thread.start()
                started.append(thread)
            self._work(placed)
        except BaseException as exc:  # no thread to be had, or a signal: the others stop at their next step
            self._fail(exc)
        for thread in started:
            thread.join()
        if self._failure is not None:
            raise self._failure

    def _work(self, placed: PolicyContext) -> None:
        try:
            with placed():
                while step := self._begin():
                    self._allocate(*step)
                    self._finish(step[1])
        except BaseException as exc:  # carried over to the thread that called run
            self._fail(exc)

    def _fail(self, exc: BaseException) -> None:
        with self._lock:
            self._failure = self._failure or exc

    def _begin(self) -> tuple[int, int] | None:
        """Take the next step; None when there is none or another thread failed."""
        with self._lock:
            size = min(self._step, self._end - self.reached)
            if self._failure is not None or size == 0:
                return None
            if self._cancelled is not None and self._cancelled():
                raise refuse(errno.ECANCELED)
            self._check(self._in_flight + size)
            step = (self.reached, size)
            self.reached += size
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
        stop = min(offset, end)
        if stop > start:
            left.append((start, stop - start))
        start = max(start, offset + size)
    return left
