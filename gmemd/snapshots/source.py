"""Where contents come from: `windows()` that may hold any, and `read(at, view)`, which never allocates a page.

What is saved, flattened, imported or copied is a Source: the memory of an object, a stored part, a file of QEMU's.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Iterator
from typing import Final, Protocol

from xxhash import xxh3_128_digest

from gmemd.errors import os_errors
from gmemd.kernel import residency, syscalls, uapi
from gmemd.kernel.rules import PAGE_SIZE
from gmemd.snapshots.pages import BLOCK, NOTHING, WINDOW
from gmemd.snapshots.tables import blocks_of_data, read_exactly, windows_of_data

_EXAMINED: Final = 1 << 30  # bytes
_DIGEST: Final = len(NOTHING)  # bytes


class Source(Protocol):
    """Contents to be read, `size` bytes of them."""

    size: int

    def total(self) -> int:
        """About how many bytes there are to read."""

    def windows(self) -> Iterator[int]:
        """The numbers of the windows that may hold anything but zeros, ascending."""

    def blocks(self, window: int) -> set[int]:
        """The numbers of the blocks of a window that may hold anything but zeros."""

    def read(self, at: int, view: memoryview) -> None:
        """Fill a buffer with what begins at an offset; holes are zeros. QmpError says what cannot be read."""


class Memory:
    """A range of a memfd, a file on any file system, or a guest_memfd; borrows the descriptor.

    Contents are copied into the reader's buffer first: what is hashed there is what is written, even while a guest
    writes. What read(2) gives never allocates a hole and never faults. A guest_memfd has no read(2): it is mapped, and
    only pages that were touched are.
    """

    def __init__(self, fd: int, offset: int, size: int, what: str) -> None:
        self.size = size
        self._fd, self._offset, self._what = fd, offset, what
        self._mapped = not readable(fd)
        self._run = (0, 0)  # the last run of data that was found: finding its end takes as long as it is
        self._memory: mmap.mmap | None = None  # all of it, for `same`

    def total(self) -> int:
        if self._mapped:
            return residency.resident(self._fd, self._offset, self.size) if residency.can_count() else self.size
        return min(self.size, os.fstat(self._fd).st_blocks * 512)

    def windows(self) -> Iterator[int]:
        self._run = (0, 0)
        with os_errors(f"cannot read '{self._what}'"):
            if self._mapped:
                yield from _touched_windows(self._fd, self._offset, self.size)
            else:
                yield from windows_of_data(self._fd, self._offset, self.size, WINDOW)

    def blocks(self, window: int) -> set[int]:
        start, length = self._offset + window * WINDOW, min(WINDOW, self.size - window * WINDOW)
        with os_errors(f"cannot read '{self._what}'"):
            if not self._mapped:
                begin, end = self._run
                if begin <= start and start + length <= end:  # what has become a hole since then reads as zeros
                    return set(range(-(-length // BLOCK)))
                found, self._run = blocks_of_data(self._fd, start, length)
                return found
            return {block for at, count in residency.touched_ranges(self._fd, start, length)
                    for block in range((at - start) // BLOCK, (at + count - 1 - start) // BLOCK + 1)}

    def prepare(self, window: int) -> None:
        """Have `same` find the pages of a window, whose `blocks` were asked for, mapped."""
        if (span := self._span(window)) is not None:
            memory, length = span
            with contextlib.suppress(OSError):  # it only takes longer then
                memory.madvise(uapi.MADV_POPULATE_READ, window * WINDOW, length)

    def same(self, window: int, digests: bytes | bytearray) -> bool:
        """Whether a window, whose `blocks` were asked for, certainly has these digests: nothing is copied.

        Who writes meanwhile does no harm: a digest that differs is made again, of a copy.
        """
        if (span := self._span(window)) is None:
            return False
        memory, length = span
        with memoryview(memory) as whole, whole[window * WINDOW:window * WINDOW + length] as view:
            for number in range(-(-length // BLOCK)):
                with view[number * BLOCK:(number + 1) * BLOCK] as block:
                    if xxh3_128_digest(block) != digests[number * _DIGEST:(number + 1) * _DIGEST]:
                        return False
        return True

    def _span(self, window: int) -> tuple[mmap.mmap, int] | None:
        """The mapping of all of it, and the bytes of a window that is all data, so reading it allocates nothing."""
        start, length = self._offset + window * WINDOW, min(WINDOW, self.size - window * WINDOW)
        begin, end = self._run
        if self._mapped or not (begin <= start and start + length <= end):
            return None
        if self._memory is None:
            try:
                self._memory = mmap.mmap(self._fd, self.size, prot=mmap.PROT_READ, offset=self._offset)
            except (OSError, ValueError):
                return None
        return self._memory, length

    def read(self, at: int, view: memoryview) -> None:
        with os_errors(f"cannot read '{self._what}'"):
            if not self._mapped:
                read_exactly(self._fd, view, self._offset + at)
                return
            start = self._offset + at
            view[:] = bytes(len(view))
            parts = residency.touched_ranges(self._fd, start, len(view))
            if parts:
                with mmap.mmap(self._fd, len(view), prot=mmap.PROT_READ, offset=start) as window:
                    for begin, count in parts:
                        _copy(window, begin - start, count, view)


def readable(fd: int) -> bool:
    """Whether read(2) works on it."""
    try:
        os.pread(fd, 1, 0)
    except OSError as exc:
        if exc.errno not in (errno.ESPIPE, errno.EINVAL):
            raise
        return False
    return True


def _copy(window: mmap.mmap, at: int, count: int, view: memoryview) -> None:
    """Copy a part of a window, page by page if some of it is private, whose pages stay zeros."""
    if touchable(window, at, count):
        with memoryview(window) as contents:
            view[at:at + count] = contents[at:at + count]
    elif count > PAGE_SIZE:
        for page in range(at, at + count, PAGE_SIZE):
            _copy(window, page, PAGE_SIZE, view)


def touchable(window: mmap.mmap, at: int, count: int) -> bool:
    """Whether a part of a window may be touched: private pages may not."""
    try:
        window.madvise(uapi.MADV_POPULATE_READ, at, count)
    except OSError as exc:
        if exc.errno != errno.EFAULT:
            raise
        return False
    return True


def _touched_windows(fd: int, offset: int, size: int) -> Iterator[int]:
    """The windows of a guest_memfd's range in which a page was touched."""
    for start in range(0, size, _EXAMINED):
        length = min(_EXAMINED, size - start)
        if residency.can_count() and not residency.resident(fd, offset + start, length):
            continue
        present = syscalls.mincore(fd, offset + start, length)
        pages = WINDOW // PAGE_SIZE
        for first in range(0, len(present), pages):
            if present.find(1, first, first + pages) >= 0:
                yield start // WINDOW + first // pages
