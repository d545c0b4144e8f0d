"""Commands about file descriptors passed by clients."""

from __future__ import annotations

import asyncio
from typing import Any

from gmemd.changes.change import Change
from gmemd.changes.threads import close_beside
from gmemd.commands.context import Caller, Gmemd
from gmemd.commands.listing import listed


def getfd(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    if arguments["fdname"] not in caller.named_fds:
        change.check_quota({"fds-held": 1})
    change.judged()
    fd = caller.take_fd()
    change.undo(lambda: close_beside([fd]))
    return _once_closed(caller.named_fds.receive(arguments["fdname"], fd))


def closefd(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    change.judged()
    return _once_closed([caller.named_fds.take(arguments["fdname"])])


def add_fd(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> dict[str, Any]:
    change.charge({"fds-held": 1})
    change.judged()
    fd = caller.take_fd()
    change.undo(lambda: close_beside([fd]))
    return gmemd.fd_sets.receive(fd, arguments.get("fdset-id"), arguments.get("opaque"), change.budget)


def remove_fd(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    change.judged()
    return _once_closed(gmemd.fd_sets.remove(arguments["fdset-id"], arguments.get("fd")))


def query_fdsets(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
    return listed(gmemd.fd_sets.describe(), len(gmemd.fd_sets))


def _once_closed(fds: list[int]) -> Any:
    """The empty answer, once the descriptors are closed; other clients do not wait for that."""
    closing = close_beside(fds)
    return {} if closing is None else _wait(closing)


async def _wait(closing: asyncio.Future[None]) -> dict[str, Any]:
    await closing
    return {}
