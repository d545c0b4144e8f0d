"""How a flush waits without knowing an event loop: it is a generator of what it waits for."""

from __future__ import annotations

import select
from collections.abc import Generator
from typing import Literal, NamedTuple


class Wait(NamedTuple):
    """What a flush waits for; the driver sends True into it when that is there, False after `timeout`.

    A driver that cannot wait throws its OSError in.
    """

    what: Literal["readable", "writable"]
    fd: int
    timeout: float  # seconds


Flush = Generator[Wait, bool, None]


def wait_for(wait: Wait, timeout: float | None = None) -> bool:
    """Wait here for what a flush waits for, at most `timeout` seconds; what is to be sent into the flush."""
    poll = select.poll()
    poll.register(wait.fd, select.POLLIN if wait.what == "readable" else select.POLLOUT)
    return bool(poll.poll(1000 * (wait.timeout if timeout is None else min(timeout, wait.timeout))))
