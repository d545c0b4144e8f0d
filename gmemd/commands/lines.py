"""Descriptors of a client for long work, such as those over which memory is sent: closed when that has ended."""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine
from typing import Any

from gmemd.changes.change import Change
from gmemd.changes.jobs import Job
from gmemd.changes.threads import close_beside
from gmemd.commands.context import Caller
from gmemd.errors import os_errors


class Line:
    """The descriptors of a client's that are written and read; -1: none. Owns them."""

    def __init__(self, out: int, into: int) -> None:
        self.out = out
        self.into = into

    @property
    def fds(self) -> list[int]:
        return [fd for fd in dict.fromkeys((self.out, self.into)) if fd >= 0]

    def close(self) -> None:
        """May be called twice."""
        fds, self.out, self.into = self.fds, -1, -1
        close_beside(fds)


def take_line(caller: Caller, arguments: dict[str, Any], change: Change,
              effect: Callable[[], str | Coroutine[Any, Any, str]] | None = None) -> Line:
    """Take the descriptors that `fdname` and `answers` name from the client; call it when all checks are done.

    effect: as for Change.judged, called for a dry run.
    """
    name, answers = arguments["fdname"], arguments.get("answers")
    for one in {name, answers} - {None}:
        caller.named_fds.look(one)
    if change.dry_run:
        change.judged(None if effect is None else effect(), whole=False)
    fd = caller.named_fds.take(name)
    line = Line(fd, -1 if answers is None else fd if answers == name else caller.named_fds.take(answers))
    change.undo(line.close)
    return line


def duplicate(caller: Caller, name: str, change: Change) -> int:
    """A duplicate of a descriptor that a client has passed by name, until the change has ended."""
    with os_errors("cannot duplicate the descriptor"):
        fd = os.dup(caller.named_fds.look(name))
    for ending in (change.undo, change.done):
        ending(lambda: close_beside([fd]))
    return fd


def state_file() -> int:
    """A file without a name for a device state, which the caller owns; QmpError."""
    with os_errors("cannot create a file for the device state"):
        return os.memfd_create("device-state", os.MFD_CLOEXEC)


def closing(work: Any, line: Line) -> Any:
    """The same work, after which the line is closed."""
    async def run(job: Job | None, change: Change) -> Any:
        try:
            return await work(job, change)
        finally:
            line.close()

    return run
