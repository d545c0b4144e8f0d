"""Two threads that share the windows of one pass: while one waits for the disk, the other hashes."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Final

from gmemd.errors import QmpError
from gmemd.snapshots.buffers import Buffers

_HANDS: Final = 2


def by_two(windows: Iterator[int], work: Callable[[int, Buffers], int]) -> Iterator[int]:
    """What `work` returns for each window, as it comes; the first exception of any ends it all."""
    turn, results = threading.Lock(), SimpleQueue[int | BaseException | None]()
    stop = threading.Event()

    def next_window() -> int | None:
        with turn:
            return None if stop.is_set() else next(windows, None)

    def hand() -> None:
        try:
            with Buffers() as buffers:
                while (window := next_window()) is not None:
                    results.put(work(window, buffers))
            results.put(None)
        except BaseException as exc:
            results.put(exc)

    threads = _started(hand, stop)
    try:
        working = _HANDS
        while working:
            result = results.get()
            if isinstance(result, BaseException):
                raise result
            if result is None:
                working -= 1
            else:
                yield result
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _started(hand: Callable[[], None], stop: threading.Event) -> list[threading.Thread]:
    threads = [threading.Thread(target=hand, daemon=True) for _ in range(_HANDS)]
    try:
        for thread in threads:
            thread.start()
    except RuntimeError:  # the only error of pthread_create(3)
        stop.set()
        raise QmpError(f"cannot start a thread: {os.strerror(errno.EAGAIN)}") from None
    return threads
