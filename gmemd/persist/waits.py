"""How a flush waits without knowing an event loop (it is a generator of what it waits for), and how it fails."""

from __future__ import annotations

import select
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Literal, NamedTuple

from gmemd.errors import QmpError

if TYPE_CHECKING:
    from gmemd.persist.batch import Operation


class Wait(NamedTuple):
    """What a flush waits for; the driver sends True into it when that is ready, False after `timeout`.

    A driver that cannot wait throws its OSError in.
    """

    what: Literal["readable", "writable"]
    fd: int
    timeout: float  # seconds


Flush = Generator[Wait, bool, None]


class NotKept(QmpError):
    """A flush failed.

    `undone`: the operations that did not happen, newest first: undo them in memory in this order. The flush's other
    operations stand and are acknowledged as usual.
    """

    def __init__(self, desc: str, undone: list[Operation]) -> None:
        super().__init__(desc)
        self.undone = undone


def block(flush: Flush, timeout: Callable[[], float]) -> None:
    """Drive a flush to its end, waiting here, each time at most as long as `timeout` says."""
    try:
        wait = next(flush)
        while True:
            try:
                there = wait_for(wait, timeout())
            except OSError as exc:
                wait = flush.throw(exc)
            else:
                wait = flush.send(there)
    except StopIteration:
        return


def wait_for(wait: Wait, timeout: float | None = None) -> bool:
    """Block until what a flush waits for is ready, at most `timeout` seconds; the value to send into the flush."""
    poll = select.poll()
    poll.register(wait.fd, select.POLLIN if wait.what == "readable" else select.POLLOUT)
    return bool(poll.poll(1000 * (wait.timeout if timeout is None else min(timeout, wait.timeout))))
