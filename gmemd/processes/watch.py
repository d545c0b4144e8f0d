"""Watching for the end of other processes through pidfds on the event loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from gmemd.errors import close_fd
from gmemd.processes.identity import start_time


def watch(pid: int, start: int, ended: Callable[[], None]) -> Callable[[], None] | None:
    """Call `ended` once when the process with that id and start time has ended; None: it already has.

    Calling the returned function ends the watch; it is called automatically before `ended`. OSError: the process cannot
    be watched now.
    """
    loop = asyncio.get_running_loop()
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    watching = True

    def end() -> None:
        nonlocal watching
        if watching:
            watching = False
            loop.remove_reader(pidfd)
            close_fd(pidfd)

    def readable() -> None:
        end()
        ended()

    try:
        if start_time(pid) != start:  # checked after opening: the pidfd stays with its process
            close_fd(pidfd)
            return None
        loop.add_reader(pidfd, readable)
    except OSError:
        close_fd(pidfd)
        raise
    return end
