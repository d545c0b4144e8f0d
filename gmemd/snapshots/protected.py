"""Memory of one moment while others go on writing it: pages are put aside before they are written for the first time.

The holder has handed its userfaultfd over. The moment is when all of its mapping is write-protected: faults are served
from then on, so nobody has seen a write that is not in the copy, nor misses one that is. A page that faults is copied
aside and its protection ends; what the reader has passed needs no protection any more.
If this process ends, its copy of the userfaultfd is the last one, and the kernel lets every fault pass.
"""

from __future__ import annotations

import errno
import os
import select
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from gmemd.errors import close_fd, os_errors
from gmemd.kernel import backing, userfault
from gmemd.snapshots.pages import BLOCK
from gmemd.snapshots.source import Memory

_STEP: Final = 1 << 20  # bytes that are read while a fault waits
_MESSAGE: Final = struct.Struct("<BxxxxxxxQQQ")  # struct uffd_msg: event, flags, address, feature
_PAGEFAULT: Final = 0x12
_MESSAGES: Final = 64  # that are taken at a time


class Protected(Memory):
    """The memory of an object that is mapped at `address`; borrows both descriptors."""

    def __init__(self, fd: int, offset: int, size: int, what: str, uffd: int, address: int) -> None:
        super().__init__(fd, offset, size, what)
        self._uffd, self._address = uffd, address
        self._page = backing.page_size(fd)
        self._lock = threading.Lock()
        self._passed = bytearray(-(-size // BLOCK))  # 1 for each block that was read
        self._aside: dict[int, bytes] = {}  # pages as they were, by offset
        self._holding = False

    @contextmanager
    def still(self) -> Iterator[None]:
        """During the block, `read` gives what was there when it began."""
        with os_errors(f"cannot write-protect '{self._what}'"):
            userfault.register_only(self._uffd, self._address, self.size, userfault.WP)
        reader, writer = os.pipe()
        thread = threading.Thread(target=self._serve, args=(reader,), daemon=True)
        try:
            with os_errors(f"cannot write-protect '{self._what}'"):
                userfault.write_protect(self._uffd, self._address, self.size, on=True)
            self._holding = True
            thread.start()
            yield
        finally:
            self._holding = False
            close_fd(writer)
            if thread.ident is not None:
                thread.join()
            close_fd(reader)
            self._release(0, self.size)
            with _while_it_lives():
                userfault.unregister_only(self._uffd, self._address, self.size)
            self._passed[:] = bytes(len(self._passed))
            self._aside.clear()

    def read(self, at: int, view: memoryview) -> None:
        for start in range(at, at + len(view), _STEP):
            part = view[start - at:start - at + _STEP]
            with self._lock:
                super().read(start, part)
                if self._holding:
                    self._overlay(start, part)
                    self._pass(start, len(part))

    def _overlay(self, start: int, view: memoryview) -> None:
        """Put what pages were into a buffer, which begins at `start`."""
        for offset in range(start // self._page * self._page, start + len(view), self._page):
            before = self._aside.get(offset)
            if before is not None:
                begin, end = max(offset, start), min(offset + self._page, start + len(view))
                view[begin - start:end - start] = before[begin - offset:end - offset]

    def _pass(self, start: int, size: int) -> None:
        """A range was read: pages of which all was read need no protection."""
        first, end = start // BLOCK, -(-(start + size) // BLOCK)
        self._passed[first:end] = b"\1" * (end - first)
        if self._page <= BLOCK:
            self._release(start, size)
            for offset in range(start, start + size, self._page) if self._aside else ():
                self._aside.pop(offset, None)
            return
        for offset in range(start // self._page * self._page, start + size, self._page):
            if self._is_passed(offset):
                self._release(offset, self._page)

    def _is_passed(self, offset: int) -> bool:
        """Whether all of the page at `offset` was read."""
        first, end = offset // BLOCK, -(-(offset + self._page) // BLOCK)
        return self._passed.find(0, first, end) < 0

    # -- serving -------------------------------------------------------------------------------------

    def _serve(self, stop: int) -> None:
        """Serve faults until the other end of the pipe `stop` is closed."""
        while True:
            ready, _, _ = select.select([self._uffd, stop], [], [])
            if stop in ready:
                return
            try:
                messages = os.read(self._uffd, _MESSAGES * _MESSAGE.size)
            except BlockingIOError:
                continue
            for event, _, address, _ in _MESSAGE.iter_unpack(messages):
                if event == _PAGEFAULT:
                    self._fault((address - self._address) // self._page * self._page)

    def _fault(self, offset: int) -> None:
        with self._lock:
            if not self._is_passed(offset) and offset not in self._aside:
                page = bytearray(self._page)
                super().read(offset, memoryview(page))
                self._aside[offset] = bytes(page)
            self._release(offset, self._page)

    def _release(self, offset: int, size: int) -> None:
        """End the protection of pages, and let those go on who wait for it."""
        with _while_it_lives():
            userfault.write_protect(self._uffd, self._address + offset, size, on=False)


@contextmanager
def _while_it_lives() -> Iterator[None]:
    """A process that has ended writes nothing more, and one that unmaps its memory neither."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in (errno.ESRCH, errno.ENOENT, errno.EINVAL):
            raise
