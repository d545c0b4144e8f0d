"""Lines for a reader that may not read: a thread writes them, so nobody waits for a pipe, a terminal or a disk.

Up to WAITING_MAX bytes of lines wait in memory. The rest is dropped and counted, as is what cannot be written; when
writing resumes, a line in their place says how many are missing. The thread ends when nothing waits.

Imports little on purpose: the keeper uses it too.
"""

from __future__ import annotations

import os
import select
from _thread import allocate_lock, start_new_thread
from time import monotonic

TYPE_CHECKING = False  # typing is not imported, like in everything that the keeper uses
if TYPE_CHECKING:
    from collections.abc import Callable

WAITING_MAX = 1 << 20  # bytes
TAKEN_SECONDS = 0.01  # seconds; a write that takes longer is not waited for
_BEGIN_SECONDS = 5.0  # seconds until a thread must have begun: one without memory to start with never does


class Lines:
    """Writes to `fd`, which is borrowed; a function given to `call` may replace it.

    `excuse` makes the line that says how many are missing. `lost` is called once with the reason why lines are missing
    from now on, `resumed` with how many were, once one is written again; in whichever thread notices.
    """

    def __init__(self, fd: int, *, excuse: Callable[[int], bytes], lost: Callable[[str], None] = lambda why: None,
                 resumed: Callable[[int], None] = lambda count: None) -> None:
        self.fd = fd
        self._excuse, self._lost, self._resumed = excuse, lost, resumed
        self._lock = allocate_lock()  # of the next five
        self._waiting: list[bytes | int | Callable[[], None]] = []  # an int: that many are missing here
        self._size = 0  # bytes that are waiting or being written
        self._thread = 0  # the number of the latest
        self._running = self._begun = False
        self._begin_by = 0.0  # monotonic seconds
        self._idle = allocate_lock()  # held while something waits or is being written
        self._since = 0.0  # when the current write began, monotonic seconds; 0: there is none
        self._missing = 0  # lines, since the last one that was written
        self._losing = self._torn = False

    def write(self, data: bytes) -> None:
        """Have whole lines written."""
        with self._lock:
            fits = not self._size or self._size + len(data) <= WAITING_MAX
            if fits:
                self._waiting.append(data)
                self._size += len(data)
            else:
                count, last = data.count(b"\n"), self._waiting[-1] if self._waiting else None
                if isinstance(last, int):
                    self._waiting[-1] = last + count
                else:
                    self._waiting.append(count)
            self._start()
        if not fits:
            self._lose("nobody reads the lines that are waiting")

    def call(self, function: Callable[[], None]) -> None:
        """Have a function called when everything given before is written."""
        with self._lock:
            self._waiting.append(function)
            self._start()

    def wait(self, seconds: float) -> bool:
        """Wait until everything is written, for a limited time; whether it is."""
        if not self._idle.acquire(timeout=seconds):
            return False
        self._idle.release()
        return True

    def wait_taken(self) -> None:
        """Wait until everything is written, but not for a write that takes long."""
        end = monotonic() + _BEGIN_SECONDS
        while not self._takes_longer_than(TAKEN_SECONDS / 2) and monotonic() < end:
            if self.wait(TAKEN_SECONDS):
                return

    def _takes_longer_than(self, seconds: float) -> bool:
        since = self._since
        return since > 0 and monotonic() - since > seconds

    def _start(self) -> None:
        """Make sure that the thread runs, or is tried again with the next line."""
        now = monotonic()
        if self._running and (self._begun or now < self._begin_by):
            return
        if not self._running:
            self._idle.acquire()
        self._running, self._begun, self._begin_by = True, False, now + _BEGIN_SECONDS
        self._thread += 1
        try:
            start_new_thread(self._run, (self._thread,))
        except RuntimeError:
            self._running = False
            self._idle.release()

    # -- in the thread ---------------------------------------------------------------------------

    def _run(self, number: int) -> None:
        with self._lock:
            if number != self._thread:
                return  # it started too late: there is another one
            self._begun = True
        told = False
        while (items := self._take(told)) is not None:
            told = not items
            if told:
                self._put(b"")
            for item in items:
                if isinstance(item, bytes):
                    self._put(item)
                elif isinstance(item, int):
                    self._missing += item
                else:
                    item()

    def _take(self, told: bool) -> list[bytes | int | Callable[[], None]] | None:
        """All waiting lines, empty if only missing ones are to be reported; None: this thread has ended."""
        with self._lock:
            items, self._waiting = self._waiting, []
            if not items and (told or not self._missing):
                self._running = False
                self._idle.release()
                return None
            return items

    def _put(self, data: bytes) -> None:
        """Write lines, preceded by how many are missing."""
        before = self._missing
        text = (b"\n" if self._torn else b"") + (self._excuse(before) if before else b"")
        end = len(text)
        text += data
        written = 0
        self._since = monotonic()
        try:
            while written < len(text):
                written += self._write(text[written:])
        except OSError as exc:
            self._missing = text[written:].count(b"\n") if written >= end else before + data.count(b"\n")
            self._torn = text[written - 1:written] != b"\n" if written else self._torn
            self._lose(os.strerror(exc.errno or 0))
        else:
            self._missing, self._torn = 0, False
            if before:
                self._losing = False
                self._resumed(before)
        finally:
            self._since = 0.0
            with self._lock:
                self._size -= len(data)

    def _write(self, data: bytes) -> int:
        while True:
            try:
                return os.write(self.fd, data)
            except BlockingIOError:  # made non-blocking by a process that shares the open file
                poll = select.poll()
                poll.register(self.fd, select.POLLOUT)
                poll.poll()

    def _lose(self, why: str) -> None:
        if not self._losing:
            self._losing = True
            self._lost(why)
