"""The worker's verb copy: fill new memory with what another file holds, and leave its holes holes.

It takes {"source": FD, "offset": BYTES, "size": BYTES, "target": FD} and says after each step {"done": BYTES}.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator

from gmemd.kernel import backing, residency
from gmemd.kernel.rules import PAGE_SIZE
from gmemd.kernel.worker import WINDOW, Message, Verb


def copy(source: int, offset: int, size: int, target: int) -> Iterator[Message]:
    """Copy a range of one file to the beginning of another, which is empty, through a mapping of that."""
    window = max(WINDOW, backing.page_size(target))
    for at, count in _present(source, offset, size):
        for start, length in _steps(at - offset, count, window):
            base = start // window * window
            with mmap.mmap(target, min(window, size - base), offset=base) as memory, memoryview(memory) as view, \
                    view[start - base:start - base + length] as part:
                _fill(part, source, offset + start)
            yield {"done": start + length}


def _present(fd: int, offset: int, size: int) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of what has any content; a file of huge pages does not say where its holes are."""
    page = backing.page_size(fd)
    if page == PAGE_SIZE:
        yield from residency.data_ranges(fd, offset, size)
        return
    for at in range(offset, offset + size, page):
        if any(os.pread(fd, WINDOW, start).strip(b"\0") for start in range(at, at + page, WINDOW)):
            yield at, page


def _steps(at: int, count: int, window: int) -> Iterator[tuple[int, int]]:
    """The parts of a range that lie in one window each."""
    while count:
        length = min(count, (at // window + 1) * window - at)
        yield at, length
        at, count = at + length, count - length


def _fill(view: memoryview, source: int, offset: int) -> None:
    done = 0
    try:
        while done < len(view):
            count = os.preadv(source, [view[done:]], offset + done)
            if not count:
                raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
            done += count
    except OSError as exc:
        if exc.errno not in (errno.ESPIPE, errno.EINVAL):
            raise
        with mmap.mmap(source, len(view), prot=mmap.PROT_READ, offset=offset) as memory:  # it has no read(2)
            view[:] = memory


VERBS: dict[str, Verb] = {"copy": lambda spec: copy(**spec)}
