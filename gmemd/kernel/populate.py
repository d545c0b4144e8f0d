"""Allocate much memory: in steps, by several threads, checking the headroom first.

Why in steps: one fallocate over the limit ends in an OOM kill and leaves its pages (reference, section 6). A step of
128 MiB takes 15 to 25 ms, so checking the headroom (0.1 ms) costs nothing and a cancellation takes effect at once; 16
to 256 MiB measured the same. The threads take steps from one counter, in ascending order, so what was begun is one
range.
"""

from __future__ import annotations

import errno
import os
import threading
from _thread import start_new_thread
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Final

from gmemd.kernel import backing, syscalls, uapi
from gmemd.kernel.headroom import HeadroomReader, check_memory, check_pool
from gmemd.kernel.numa import policy_for_thread
from gmemd.kernel.rules import PAGE_SIZE, check_inside, refuse

STEP: Final = 128 << 20  # bytes
UNIT: Final = 2 << 20  # bytes; small objects are divided among the threads in multiples of this

Placed = Callable[[], AbstractContextManager[None]]  # sets the policy of the thread that enters it
Check = Callable[[int, int, int], None]  # bytes in flight, and the offset and bytes of the next step


def populate(fd: int, offset: int, size: int, threads: int, *, fresh: bool = False, policy: str = "default",
             nodes: Sequence[int] = (), progress: Callable[[int], None] | None = None,
             cancelled: Callable[[], bool] | None = None) -> None:
    """Allocate a range with `threads` threads in steps, checking the headroom before each. Takes long.

    threads: the maximum, including the caller; no more than the number of CPUs are used.
    fresh: no other process has the fd yet; a failure or cancellation then frees exactly what was newly allocated (a
    file on a disk is left alone). Otherwise it stays: a holder may have written there already.
    policy, nodes: set for the threads; on a kernel without `shared_policy` only this places a guest_memfd's pages.
    progress is called with the bytes done so far, cancelled between steps; both in any of the threads, one at a time.
    Raises NoHeadroom (ENOMEM), ECANCELED, or the errno of `Kernel.allocate`.
    """
    check_inside(offset, size, os.fstat(fd).st_size)
    placed: Placed = partial(policy_for_thread, policy, nodes) if policy != "default" else nullcontext
    page = backing.page_size(fd)
    existing = backing.contents(fd, offset, size) if fresh else None
    check = _checked(fd, backing.missing(fd, offset, size), page, fresh=fresh)
    population = Population(fd, offset, size, check=check, progress=progress, cancelled=cancelled)
    try:
        population.run(threads, placed, page)
    except BaseException as exc:
        if existing is not None:
            _give_back(fd, without(existing, offset, population.reached), exc)
        raise


def _checked(fd: int, missing: int, page: int, *, fresh: bool) -> Check:
    """Raise NoHeadroom if what is missing does not fit; return the check to make before each step.

    An exhausted pool of huge pages is ENOSPC, not a kill, so one check is enough; and none for a file that others may
    have mapped, because pages may be reserved for it. A disk's blocks are left to its file system.
    """
    if page != PAGE_SIZE:
        if fresh:  # mapping it as a test has reserved pages for it
            check_pool(missing, page, own_reservation=missing)
        return lambda *_: None
    if not backing.is_only_memory(fd):
        return lambda *_: None
    reader = HeadroomReader()
    check_memory(missing, reader)

    def check(in_flight: int, offset: int, size: int) -> None:
        check_memory(in_flight + size, reader, lambda: size - backing.missing(fd, offset, size))

    return check


def _give_back(fd: int, ranges: list[tuple[int, int]], reason: BaseException) -> None:
    try:
        for start, length in ranges:
            syscalls.fallocate(fd, uapi.FALLOC_FL_KEEP_SIZE | uapi.FALLOC_FL_PUNCH_HOLE, start, length)
    except OSError as exc:
        reason.add_note(f"the allocated memory could not be freed: {exc.strerror}")


def shared_among(size: int, threads: int, unit: int, cpus: int) -> tuple[int, int]:
    """The number of threads and the bytes of a step, a multiple of `unit`.

    More threads than CPUs gain nothing, and a client may ask for 2^32 - 1.
    """
    threads = max(1, min(threads, cpus))
    share = -(-size // threads)
    step = max(unit, min(STEP, share) // unit * unit)
    return min(threads, -(-size // step)), step


class Population:
    """One run over a range; `run` returns when everything is allocated, or raises after all threads have ended."""

    def __init__(self, fd: int, offset: int, size: int, *, check: Check, progress: Callable[[int], None] | None,
                 cancelled: Callable[[], bool] | None) -> None:
        self._fd = fd
        self._check = check
        self._progress = progress
        self._cancelled = cancelled
        self._lock = threading.Condition()
        self._at_work = 0  # threads
        self._over = False  # threads that have not started by now need not
        self._end = offset + size
        self._size = size
        self.step = STEP
        self._in_flight = 0  # bytes
        self._done = 0  # bytes
        self._failure: BaseException | None = None
        self.reached = offset  # steps were begun up to here

    def run(self, threads: int, placed: Placed, unit: int = UNIT) -> None:
        """Allocate with that many threads, including the caller, each under the policy that `placed` sets.

        unit is the least that can be allocated and freed: a huge page may be larger than UNIT.
        """
        cpus = len(os.sched_getaffinity(0))
        count, self.step = shared_among(self._size, threads, max(unit, UNIT), cpus)
        try:
            for _ in range(count - 1):
                start_new_thread(self._work, (placed,))  # do not wait for one without memory to start with
            self._work(placed)
        except RuntimeError:  # no thread available: the only error of pthread_create(3)
            self._fail(refuse(errno.EAGAIN))
        except BaseException as exc:  # a signal: the others stop at their next step
            self._fail(exc)
        with self._lock:
            self._over = True
            self._lock.wait_for(lambda: not self._at_work)
        if self._failure is not None:
            raise self._failure

    def _work(self, placed: Placed) -> None:
        with self._lock:
            if self._over:
                return
            self._at_work += 1
        try:
            with placed():
                while step := self._begin():
                    syscalls.fallocate(self._fd, uapi.FALLOC_FL_KEEP_SIZE, *step)
                    self._finish(step[1])
        except BaseException as exc:  # passed to the thread that called run
            self._fail(exc)
        finally:
            with self._lock:
                self._at_work -= 1
                self._lock.notify()

    def _fail(self, exc: BaseException) -> None:
        with self._lock:
            self._failure = self._failure or exc

    def _begin(self) -> tuple[int, int] | None:
        """Take the next step; None when there is none or another thread has failed."""
        with self._lock:
            size = min(self.step, self._end - self.reached)
            if self._failure is not None or size == 0:
                return None
            if self._cancelled is not None and self._cancelled():
                raise refuse(errno.ECANCELED)
            step = (self.reached, size)
            self._check(self._in_flight, *step)
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
    """[(offset, bytes)] of what is left of start..end without the ranges (ascending)."""
    left = []
    for offset, size in [*ranges, (end, 0)]:
        stop = min(offset, end)
        if stop > start:
            left.append((start, stop - start))
        start = max(start, offset + size)
    return left
