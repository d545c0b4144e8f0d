"""Allocating much: all of it, by threads, in steps, with head-room; or nothing of it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import nullcontext
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmemd.kernel import headroom, syscalls, uapi
from gmemd.kernel.headroom import NoHeadroom
from gmemd.kernel.kernel import Kernel
from gmemd.kernel.populate import STEP, UNIT, Population, shared_among, without
from gmemd.kernel.rules import PAGE_SIZE
from tests.kernel.conftest import HUGE
from tests.kernel.host import errno_of, read_page, write_page

Make = Callable[..., int]
MIB = 1 << 20
CANCELLED = errno.ECANCELED


def after(steps: int) -> Callable[[], bool]:
    """A `cancelled` that is true from the call after so many on."""
    calls = count()
    return lambda: next(calls) >= steps


@pytest.mark.parametrize("threads", [1, 2, 2**32 - 1])
def test_every_page_is_allocated(kernel: Kernel, make: Make, threads: int) -> None:
    """Any number of threads allocates everything, reports each step, and allocates nothing twice."""
    size = 32 * MIB
    fd, told = make(size), list[int]()
    kernel.populate(fd, 0, size, threads, progress=told.append)
    assert told == sorted(told)
    assert (told[-1], kernel.resident(fd)) == (size, size)
    kernel.populate(fd, 0, size, threads, progress=told.append)
    assert kernel.resident(fd) == size


def test_a_part_is_allocated(kernel: Kernel, make: Make) -> None:
    """Only the range that was asked for, and it must be inside the size."""
    fd = make(8 * PAGE_SIZE)
    kernel.populate(fd, 2 * PAGE_SIZE, 3 * PAGE_SIZE, 4)
    assert kernel.resident_ranges(fd, 0, 8 * PAGE_SIZE) == [(2 * PAGE_SIZE, 3 * PAGE_SIZE)]
    for offset, size in ((0, 9 * PAGE_SIZE), (8 * PAGE_SIZE, PAGE_SIZE), (1, PAGE_SIZE), (0, 0)):
        assert errno_of(kernel.populate, fd, offset, size, 1) == errno.EINVAL


@pytest.mark.parametrize("threads", [1, 2])
def test_a_cancelled_population_gives_back_what_it_made(kernel: Kernel, make: Make, threads: int) -> None:
    """What was there before stays, with its bytes; what was new is gone. Then it can be done again."""
    size = STEP + 2 * UNIT
    fd = make(size)
    write_page(fd, 5, 0xAA)
    code = errno_of(kernel.populate, fd, 0, size, threads, fresh=True, cancelled=after(1))
    assert code == CANCELLED
    assert kernel.resident_ranges(fd, 0, size) == [(5 * PAGE_SIZE, PAGE_SIZE)]
    assert read_page(fd, 5) == b"\xaa" * PAGE_SIZE
    kernel.populate(fd, 0, size, threads, fresh=True, cancelled=lambda: False)
    assert kernel.resident(fd) == size


def test_memory_that_others_have_is_never_taken_back(kernel: Kernel, make: Make) -> None:
    """Another holder may have written into a new page meanwhile, so it stays."""
    size = STEP + UNIT
    fd = make(size)
    assert errno_of(kernel.populate, fd, 0, size, 1, cancelled=after(1)) == CANCELLED
    assert kernel.resident(fd) == STEP


def test_a_disks_file_is_never_punched(kernel: Kernel, tmp_path: Path) -> None:
    """Its data need not be in memory, so nothing can be told to be new."""
    path = tmp_path / "memory"
    path.write_bytes(b"\xaa" * PAGE_SIZE)
    os.truncate(path, STEP + UNIT)
    fd = os.open(path, os.O_RDWR)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    code = errno_of(kernel.populate, fd, 0, STEP + UNIT, 1, fresh=True, cancelled=after(1))
    first = os.pread(fd, PAGE_SIZE, 0)
    os.close(fd)
    assert (code, first) == (CANCELLED, b"\xaa" * PAGE_SIZE)


def test_more_than_there_is_is_refused_with_figures(kernel: Kernel, make: Make) -> None:
    """ENOMEM before the first page, and the error says how much there was."""
    fd = make(1 << 50)
    with pytest.raises(NoHeadroom) as refused:
        kernel.populate(fd, 0, 1 << 50, 1, fresh=True)
    error = refused.value
    assert (error.errno, error.wanted) == (errno.ENOMEM, 1 << 50)
    assert 0 < error.headroom.available < error.headroom.total < 1 << 50
    assert str(error.headroom.available) in str(error)
    assert kernel.resident(fd) == 0


def test_what_exists_needs_no_headroom(kernel: Kernel, make: Make) -> None:
    """The question is how much is missing, not how large the object is."""
    fd = make(4 * PAGE_SIZE)
    kernel.populate(fd, 0, 4 * PAGE_SIZE, 1)
    kernel.check_headroom(0)
    with pytest.raises(NoHeadroom):
        kernel.check_headroom(1 << 50)
    with pytest.raises(NoHeadroom):
        kernel.check_headroom(1 << 50, fd)


def test_a_failing_thread_stops_the_others(make: Make, kernel: Kernel) -> None:
    """The first error is the one that is raised, after all threads have ended; begun steps are known."""
    size = STEP + UNIT
    fd = make(size)
    steps = count()

    def check(in_flight: int, offset: int, size: int) -> None:
        if next(steps) == 1:
            raise OSError(errno.ENOMEM, "full")

    population = Population(fd, 0, size, check=check, progress=None, cancelled=None)
    assert errno_of(population.run, 2, nullcontext) == errno.ENOMEM
    assert population.reached == kernel.resident(fd) < size


def test_an_error_of_the_listener_ends_the_population(kernel: Kernel, make: Make) -> None:
    """What `progress` raises comes out of populate, and everything is given back."""

    def progress(done: int) -> None:
        raise ZeroDivisionError

    fd = make(4 * UNIT)
    with pytest.raises(ZeroDivisionError):
        kernel.populate(fd, 0, 4 * UNIT, 2, fresh=True, progress=progress)
    assert kernel.resident(fd) == 0


def test_threads_allocate_under_the_policy(kernel: Kernel, make: Make) -> None:
    """The policy is the threads' own for the time, and the caller's is afterwards what it was."""
    before = syscalls.get_mempolicy()
    kernel.populate(make(4 * UNIT), 0, 4 * UNIT, 2, policy="bind", nodes=[0])
    assert syscalls.get_mempolicy() == before
    fd = make(PAGE_SIZE)
    assert errno_of(kernel.populate, fd, 0, PAGE_SIZE, 1, policy="bind", nodes=[1023]) == errno.EINVAL
    assert kernel.resident(fd) == 0


def test_huge_pages_are_all_or_nothing(kernel: Kernel, huge_pages: Callable[[int], None]) -> None:
    """A pool that is too small is seen at the start; one that runs out gets back what was taken."""
    huge_pages(3)
    fd = kernel.memfd_create("huge", uapi.MFD_HUGETLB | 21 << uapi.MFD_HUGE_SHIFT)
    try:
        kernel.truncate(fd, 4 * HUGE)
        with pytest.raises(NoHeadroom) as refused:
            kernel.populate(fd, 0, 4 * HUGE, 2, fresh=True)
        assert refused.value.headroom.limit == "the pool of 2048 KiB pages"
        assert refused.value.headroom.available == 3 * HUGE
        assert errno_of(kernel.populate, fd, 0, 4 * HUGE, 1) == errno.ENOSPC
        assert kernel.resident(fd) == 3 * HUGE  # others may hold it: the part stays
        kernel.punch_hole(fd, 0, 4 * HUGE)
        assert errno_of(kernel.populate, fd, 0, 4 * HUGE, 1, fresh=True, cancelled=after(0)) == errno.ENOMEM
        assert errno_of(kernel.populate, fd, 0, 3 * HUGE, 1, fresh=True, cancelled=after(0)) == CANCELLED
        assert kernel.resident(fd) == 0
        kernel.populate(fd, 0, 3 * HUGE, 2, fresh=True)
        kernel.populate(fd, 0, 3 * HUGE, 2, fresh=True)
        assert kernel.resident(fd) == 3 * HUGE
    finally:
        os.close(fd)


# ---- the pure parts ----------------------------------------------------------------------------------------

sizes = st.integers(1, 1 << 40).map(lambda pages: pages * PAGE_SIZE)


@given(sizes, st.integers(1, 2**32 - 1), st.sampled_from([UNIT, 1 << 30]), st.integers(1, 64))
def test_threads_and_steps_are_few_enough(size: int, threads: int, unit: int, cpus: int) -> None:
    """No more threads than asked for, than CPUs, than steps; a step is of whole units, and not too large."""
    used, step = shared_among(size, threads, unit, cpus)
    assert 1 <= used <= min(threads, cpus, -(-size // step))
    assert step % unit == 0
    assert step <= max(STEP, unit)


runs = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 5)), max_size=6)


@given(runs=runs, start=st.integers(0, 30), length=st.integers(0, 40))
def test_without_is_a_difference_of_sets(runs: list[tuple[int, int]], start: int, length: int) -> None:
    """What is left is what was in start..end and in none of the ranges."""
    ranges, at = [], 0
    for gap, size in runs:
        ranges.append((at + gap, size))
        at += gap + size
    taken = {page for offset, size in ranges for page in range(offset, offset + size)}
    left = without(ranges, start, start + length)
    assert sorted(page for offset, size in left for page in range(offset, offset + size)) == [
        page for page in range(start, start + length) if page not in taken
    ]


def test_the_kernels_own_need_is_counted() -> None:
    """2.4 to 4.4 MiB a GiB go to the kernel itself."""
    assert headroom.with_overhead(1 << 30) == (1 << 30) + 4 * MIB
