"""What does not run on the event loop: functions that block, and closing what takes long to close."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from _thread import start_new_thread
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

from gmemd.errors import QmpError, close_fd
from gmemd.kernel.syscalls import seals

_THREAD_PATIENCE: Final = 5.0  # seconds until a thread must have begun
_CLOSED_AT_ONCE: Final = 4 << 20  # bytes of memory that may be freed on the event loop: about a millisecond


def in_thread(function: Callable[..., Any], *arguments: Any) -> Awaitable[Any]:
    """Run a function that blocks in a thread of its own: one that never returns does not keep the process alive.

    Not by threading.Thread, whose start() waits for ever for a thread that has no memory to begin with (gh-140746).
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()
    first: list[Callable[[], None]] = []  # who came first, `work` or `give_up`

    def settle(result: Any, error: BaseException | None) -> None:
        patience.cancel()
        if not future.done():
            future.set_result(result) if error is None else future.set_exception(error)

    def work() -> None:
        first.append(work)
        if first[0] is not work:
            return
        try:
            outcome: tuple[Any, BaseException | None] = (function(*arguments), None)
        except BaseException as exc:
            outcome = (None, exc)
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, *outcome)

    def give_up() -> None:
        first.append(give_up)
        if first[0] is give_up:
            settle(None, QmpError(f"cannot start a thread: {os.strerror(errno.ENOMEM)}"))

    try:
        start_new_thread(work, ())
    except RuntimeError as exc:  # pthread_create(3) knows EAGAIN alone
        raise QmpError(f"cannot start a thread: {os.strerror(errno.EAGAIN)}") from exc
    patience = loop.call_later(_THREAD_PATIENCE, give_up)
    return future


def beside(function: Callable[[], object]) -> asyncio.Future[None]:
    """Have a function that blocks run, surely: here, where no thread is to be had. The future ends by no error.

    For what must be done, and whose failure is nobody's concern any more.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def ended(running: asyncio.Future[Any] | None) -> None:
        error = QmpError("") if running is None else None if running.cancelled() else running.exception()
        if isinstance(error, QmpError):  # it has not begun
            with contextlib.suppress(OSError):
                function()
        if not done.done():
            done.set_result(None)

    def quietly() -> None:
        with contextlib.suppress(OSError, QmpError):
            function()

    try:
        asyncio.ensure_future(in_thread(quietly)).add_done_callback(ended)
    except QmpError:
        ended(None)
    return done


def close_beside(fds: Iterable[int], *, first: Callable[[], object] | None = None) -> asyncio.Future[None] | None:
    """Close descriptors, which are given away, without holding the event loop up.

    None: they are closed. Else the future that ends, never by an error, when they are. Closing the last descriptor of
    memory frees it (0.3 s a GiB), and a socket may linger for as long as whoever passed it has set.
    `first` is done before, where there is any; then the descriptors are not even looked at here.
    """
    slow = [fd for fd in fds if first is not None or not _closed_at_once(fd)]
    if not slow:
        return None

    def close() -> None:
        if first is not None:
            with contextlib.suppress(OSError):
                first()
        while slow:
            close_fd(slow.pop())

    try:
        return beside(close)
    except RuntimeError:  # no loop is running: nobody waits
        close()
        return None


def close_copies(fds: list[int]) -> None:
    """Close what somebody else has open, too, so that nothing is freed; the list is empty then.

    Even that asks the server of a file (FUSE_FLUSH, NFS), which may not answer.
    """
    on_disk = []
    while fds:
        fd, link = fds.pop(), "/"
        with contextlib.suppress(OSError):
            link = os.readlink(f"/proc/self/fd/{fd}")
        if link.startswith("/") and not link.startswith("/memfd:"):
            on_disk.append(fd)
        else:
            close_fd(fd)
    close_beside(on_disk)


def _closed_at_once(fd: int) -> bool:
    """Close it here if that cannot take long: a pipe, or little memory. To ask what else it is may take long, too."""
    try:
        if seals(fd) is not None:
            return closed_at_once(fd)
        if not os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:"):
            return False
    except OSError:
        return False
    close_fd(fd)
    return True


def closed_at_once(fd: int) -> bool:
    """Close the descriptor of a memfd here if there is little in it; else it stays open."""
    try:
        if os.fstat(fd).st_blocks * 512 > _CLOSED_AT_ONCE:  # swapped pages are among them
            return False
    except OSError:
        return False
    close_fd(fd)
    return True
