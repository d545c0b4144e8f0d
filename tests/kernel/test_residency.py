"""Resident bytes and ranges, exact and without touching anything."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

from gmemd.kernel import residency, uapi
from gmemd.kernel.kernel import Kernel
from gmemd.kernel.rules import PAGE_SIZE
from tests.kernel.conftest import HUGE
from tests.kernel.host import errno_of, write_page

TIB = 1 << 40


def test_ranges_are_those_that_were_allocated(kernel: Kernel, make: Callable[..., int]) -> None:
    """A thousand scattered pages are found, each in its place, neighbours joined."""
    pages = 1 << 16
    fd = make(pages * PAGE_SIZE)
    chosen = sorted(random.Random(1).sample(range(pages), 1000))
    for page in chosen:
        kernel.allocate(fd, page * PAGE_SIZE, PAGE_SIZE)
    expected: list[tuple[int, int]] = []
    for page in chosen:
        if expected and sum(expected[-1]) == page * PAGE_SIZE:
            expected[-1] = (expected[-1][0], expected[-1][1] + PAGE_SIZE)
        else:
            expected.append((page * PAGE_SIZE, PAGE_SIZE))
    assert kernel.resident_ranges(fd, 0, pages * PAGE_SIZE) == expected
    assert kernel.resident(fd) == 1000 * PAGE_SIZE


def test_touched_pages_are_found_beside_others(kernel: Kernel, make: Callable[..., int]) -> None:
    """Scattered pages that were written, some that were only allocated, and holes: each is what it is."""
    pages = 1 << 15
    fd, chance = make(pages * PAGE_SIZE), random.Random(2)
    written = set(chance.sample(range(pages), 3000))
    allocated = set(chance.sample(range(pages // 2), 20))  # in a part of it
    for page in sorted(allocated):
        kernel.allocate(fd, page * PAGE_SIZE, PAGE_SIZE)
    for page in sorted(written):
        write_page(fd, page, 1)
    found = {page for at, size in kernel.resident_ranges(fd, 0, pages * PAGE_SIZE)
             for page in range(at // PAGE_SIZE, (at + size) // PAGE_SIZE)}
    assert found == written | allocated
    data = {page for at, size in residency.data_ranges(fd, 0, pages * PAGE_SIZE)
            for page in range(at // PAGE_SIZE, (at + size) // PAGE_SIZE)}
    assert written <= data <= found
    if not kernel.is_simulated(fd):
        assert data == written


def test_a_page_in_a_terabyte_is_found(kernel: Kernel, make: Callable[..., int]) -> None:
    """Sparse files cost nothing to measure."""
    fd = make(TIB)
    kernel.allocate(fd, TIB // 2 + 7 * PAGE_SIZE, PAGE_SIZE)
    assert kernel.resident_ranges(fd, 0, TIB) == [(TIB // 2 + 7 * PAGE_SIZE, PAGE_SIZE)]
    assert kernel.resident(fd, 0, TIB // 2) == 0
    assert kernel.resident(fd, TIB // 2) == PAGE_SIZE


def test_ranges_must_be_pages(kernel: Kernel, make: Callable[..., int]) -> None:
    """Half pages are EINVAL, here as everywhere; past the end there is nothing."""
    fd = make(4 * PAGE_SIZE)
    assert errno_of(kernel.resident, fd, 1, PAGE_SIZE) == errno.EINVAL
    assert errno_of(kernel.resident_ranges, fd, 0, 1) == errno.EINVAL
    assert errno_of(kernel.resident, fd, -PAGE_SIZE, PAGE_SIZE) == errno.EINVAL
    assert kernel.resident(fd, 1 << 30, PAGE_SIZE) == 0


def test_a_files_cache_is_counted(kernel: Kernel, tmp_path: Path) -> None:
    """Of an ordinary file those bytes count that are in memory."""
    path = tmp_path / "memory"
    path.write_bytes(bytes(4 * PAGE_SIZE))
    fd = os.open(path, os.O_RDWR)
    resident = kernel.resident(fd)
    os.close(fd)
    assert resident == 4 * PAGE_SIZE


def test_huge_pages_are_counted_as_a_whole(kernel: Kernel, huge_pages: Callable[[int], None]) -> None:
    """cachestat does not do huge pages: the whole file is counted, a part only where that tells it."""
    huge_pages(2)
    fd = kernel.memfd_create("huge", uapi.MFD_HUGETLB | 21 << uapi.MFD_HUGE_SHIFT)
    try:
        kernel.truncate(fd, 2 * HUGE)
        assert (kernel.resident(fd), kernel.resident_ranges(fd, 0, 2 * HUGE)) == (0, [])
        kernel.allocate(fd, HUGE, HUGE)
        assert kernel.resident(fd) == HUGE
        assert errno_of(kernel.resident, fd, 0, HUGE) == errno.EOPNOTSUPP
        kernel.allocate(fd, 0, HUGE)
        assert kernel.resident(fd, 0, HUGE) == HUGE
        assert kernel.resident_ranges(fd, 0, 2 * HUGE) == [(0, 2 * HUGE)]
        kernel.punch_hole(fd, 0, 2 * HUGE)
        assert kernel.resident(fd) == 0
    finally:
        os.close(fd)


def test_blocks_agree_on_a_memfd(kernel: Kernel) -> None:
    """The fallback for kernels without cachestat counts the same on a memfd."""
    fd = kernel.memfd_create("ordinary", 0)
    kernel.truncate(fd, 8 * PAGE_SIZE)
    kernel.allocate(fd, 0, 3 * PAGE_SIZE)
    counts = kernel.resident(fd), residency.by_blocks(fd, 0, 0)
    os.close(fd)
    assert counts == (3 * PAGE_SIZE, 3 * PAGE_SIZE)


def test_blocks_do_not_pretend_to_know_a_guest_memfd(kernel: Kernel, make: Callable[..., int]) -> None:
    """A real guest_memfd has no blocks however full it is: no answer is better than 0."""
    fd = make(PAGE_SIZE)
    kernel.allocate(fd, 0, PAGE_SIZE)
    if kernel.simulated:
        assert residency.by_blocks(fd, 0, 0) == PAGE_SIZE
    else:
        assert errno_of(residency.by_blocks, fd, 0, 0) == errno.EOPNOTSUPP
