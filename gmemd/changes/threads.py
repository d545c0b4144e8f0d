"""What does not run on the event loop: functions that block, and slow closing of descriptors."""

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
    """Run a blocking function in a new thread: one that never returns does not keep the process alive.

    Without threading.Thread, whose start() waits forever for a thread that lacks memory to start with (gh-140746).
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()
    first: list[Callable[[], None]] = []  # which came first, `work` or `give_up`

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
    except RuntimeError as exc:  # the only error of pthread_create(3)
        raise QmpError(f"cannot start a thread: {os.strerror(errno.EAGAIN)}") from exc
    patience = loop.call_later(_THREAD_PATIENCE, give_up)
    return future


def beside(function: Callable[[], object]) -> asyncio.Future[None]:
    """Run a blocking function in any case: here, if no thread can be started.

    The future never ends with an error. For what must be done, and whose failure no longer matters.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def ended(running: asyncio.Future[Any] | None) -> None:
        error = QmpError("") if running is None else None if running.cancelled() else running.exception()
        if isinstance(error, QmpError):  # it has not started
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
    """Close descriptors, which are given away, without holding up the event loop.

    None: they are closed. Otherwise a future that ends, never with an error, when they are. Closing the last descriptor
    of memory frees it (0.3 s per GiB), and a socket may linger as long as its sender has set. `first`, if given, is
    called before; then the descriptors are not even examined here.
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
    """Close descriptors of files that are also open elsewhere, so nothing is freed; empties the list.

    Even that calls the server of a file (FUSE_FLUSH, NFS), which may not answer.
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
    """Close it here if that is certain to be fast: a pipe, or little memory. Examining anything else may be slow
    too."""
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
    """Close the descriptor of a memfd here if it holds little memory; otherwise it stays open."""
    try:
        if os.fstat(fd).st_blocks * 512 > _CLOSED_AT_ONCE:  # including swapped pages
            return False
    except OSError:
        return False
    close_fd(fd)
    return True
