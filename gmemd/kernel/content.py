"""Copy bytes between a guest_memfd, which has no read and write, and an ordinary memfd.

The guest_memfd is mapped in windows: it is shared and can never shrink, so touching it raises no SIGBUS. System calls,
which release the GIL, do the copying.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

WINDOW = 16 << 20  # bytes


def copy_out(source: int, target: int, offset: int, size: int) -> None:
    """Copy a range of the guest_memfd `source` to the same offset of the memfd `target`."""
    for at, view in _windows(source, offset, size):
        done = 0
        while done < len(view):
            done += os.pwrite(target, view[done:], at + done)


def copy_in(source: int, target: int, offset: int, size: int) -> None:
    """Copy a range of the memfd `source` to the same offset of the guest_memfd `target`."""
    for at, view in _windows(target, offset, size):
        done = 0
        while done < len(view):
            done += os.preadv(source, [view[done:]], at + done)


def _windows(fd: int, offset: int, size: int) -> Iterator[tuple[int, memoryview]]:
    """Map a range part by part; yields each with its offset in the file."""
    for at in range(offset, offset + size, WINDOW):
        with mmap.mmap(fd, min(WINDOW, offset + size - at), offset=at) as window, memoryview(window) as view:
            yield at, view
