"""Signals as bytes that poll(2) can wait for."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def noted(numbers: tuple[int, ...]) -> Iterator[int]:
    """Inside `with`, turn these signals into bytes with their numbers; yields the fd to read them from."""
    woken, waker = os.pipe()
    os.set_blocking(waker, False)
    old_waker = signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    # a handler must exist for the number to be written
    old_handlers = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        yield woken
    finally:
        signal.set_wakeup_fd(old_waker)
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
        os.close(woken)
        os.close(waker)
