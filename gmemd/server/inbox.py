"""What one client has sent that was not taken yet: its descriptors, and the requests that were read ahead.

Descriptors come with any bytes and wait for a command to take one: the first of a batch; a later batch replaces it.
Behind requests that were read ahead they queue, so each command finds what it would have found without reading ahead.
"""

from __future__ import annotations

import array
import socket
from collections import deque
from collections.abc import Callable, Sequence

from gmemd.errors import QmpError
from gmemd.qmp.session import Request
from gmemd.server.users import User


class Inbox:
    """`ready` is called when unwanted descriptors are closed, which may take long."""

    def __init__(self, user: User, ready: Callable[[], None]) -> None:
        self._user = user
        self.line: deque[Request | int] = deque()  # an fd is before what it came with
        self.requests = 0  # in the queue
        self.closing = 0  # batches that are being closed
        self._ready = ready
        self._fd = -1  # the first of the last batch

    def receive(self, ancillary: Sequence[tuple[int, int, bytes]], *, ahead: bool) -> None:
        """Keep descriptors that came with bytes; `ahead`: behind requests that are still to be carried out."""
        batch = array.array("i")
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                batch.frombytes(payload[:len(payload) - len(payload) % batch.itemsize])
        if not batch:
            return
        fd, *rest = batch
        self._dismiss(rest)
        last = self.line[-1] if self.line else None
        if isinstance(last, int):  # nothing could take it any more
            self.line.pop()
            self._dismiss([last])
        if ahead or self.line:
            self.line.append(fd)
        else:
            self._keep(fd)

    def take_fd(self) -> int:
        """Give away the first fd of the last batch."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            raise QmpError("No file descriptor supplied via SCM_RIGHTS")
        return fd

    def push(self, request: Request) -> None:
        """Queue a request."""
        self.line.append(request)
        self.requests += 1

    def pop(self) -> Request | None:
        """The first queued request, if any; the descriptors that came before it can now be taken."""
        while self.line:
            first = self.line.popleft()
            if isinstance(first, Request):
                self.requests -= 1
                return first
            self._keep(first)
        return None

    def empty(self) -> list[int]:
        """Forget everything queued; the descriptors, given away."""
        fds = [entry for entry in self.line if isinstance(entry, int)]
        self.line.clear()
        self.requests = 0
        if self._fd >= 0:
            fds.append(self.take_fd())
        return fds

    def close(self) -> list[int]:
        """The same for good."""
        self._ready = lambda: None  # so that nothing refers to the monitor any more
        return self.empty()

    def _keep(self, fd: int) -> None:
        before, self._fd = self._fd, fd
        self._dismiss([before] if before >= 0 else [])

    def _dismiss(self, fds: list[int]) -> None:
        """Close unwanted descriptors."""
        if fds and self._user.dismiss(fds, self._closed):
            self.closing += 1

    def _closed(self) -> None:
        self.closing -= 1
        self._ready()
