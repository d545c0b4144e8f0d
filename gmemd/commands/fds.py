"""Commands about file descriptors passed by clients."""

from __future__ import annotations

from typing import Any

from gmemd.commands.context import Caller, Gmemd
from gmemd.errors import close_fd


def getfd(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> dict[str, Any]:
    gmemd.named_fds.receive(arguments["fdname"], caller.take_fd())
    return {}


def closefd(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> dict[str, Any]:
    close_fd(gmemd.named_fds.take(arguments["fdname"]))
    return {}


def add_fd(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> dict[str, Any]:
    return gmemd.fd_sets.receive(caller.take_fd(), arguments.get("fdset-id"), arguments.get("opaque"))


def remove_fd(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> dict[str, Any]:
    gmemd.fd_sets.remove(arguments["fdset-id"], arguments.get("fd"))
    return {}


def query_fdsets(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> list[Any]:
    return gmemd.fd_sets.describe()
