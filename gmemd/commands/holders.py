"""The command that tells who holds an object, and looking for the holders of many at once."""

from __future__ import annotations

import os
from collections.abc import Collection, Coroutine, Iterable
from time import thread_time
from typing import Any

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.threads import close_beside, in_thread
from gmemd.commands.context import Caller, Gmemd
from gmemd.errors import QmpError, close_fd, os_errors
from gmemd.holders import File, Holder, Memory, holders_of
from gmemd.kernel.maps import shown

Found = dict[Memory, list[Holder]]


def query_memdev_holders(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Coroutine[Any, Any, Any]:
    backend = gmemd.objects.find(arguments["id"])
    with os_errors(f"cannot look for the holders of '{backend.id}'"):
        memory, fds = memory_of(backend), _duplicates([backend])

    async def work() -> list[dict[str, Any]]:
        found, _ = await _look([memory], fds)
        return [describe(holder) for holder in found.get(memory, [])]

    return work()


def describe(holder: Holder) -> dict[str, Any]:
    """The members of MemdevHolder."""
    return {"pid": holder.pid, "uid": holder.uid, "comm": holder.comm, "fds": holder.fds, "mapped": holder.mapped,
            "writable": holder.writable, "private-copy": holder.private_copy,
            **({} if holder.cgroup is None else {"cgroup": holder.cgroup})}


def memory_of(backend: HostMemoryBackend) -> Memory:
    """What memory an object is."""
    status = os.fstat(backend.fd)
    return Memory((status.st_dev, status.st_ino), backend.offset, backend.memory_size)


async def look(backends: Collection[HostMemoryBackend]) -> tuple[Found, float]:
    """Who holds the memory of each of the objects, and the seconds of CPU time that looking took.

    QmpError where there is a shortage of what looking takes.
    """
    with os_errors("cannot look for holders"):
        wanted, fds = [memory_of(backend) for backend in backends], _duplicates(backends)
    return await _look(wanted, fds)


def _duplicates(backends: Iterable[HostMemoryBackend]) -> list[int]:
    """Descriptors, now the caller's, of those files of which only a mapping tells how /proc shows them."""
    fds: list[int] = []
    try:
        for backend in backends:
            if backend.kind == "file":
                fds.append(os.dup(backend.fd))
    except OSError:
        close_beside(fds)
        raise
    return fds


async def _look(wanted: Collection[Memory], fds: list[int]) -> tuple[Found, float]:
    """Look in a thread, which closes the fds."""
    try:
        found: tuple[Found, float] = await in_thread(_look_and_close, wanted, fds)
    except QmpError:  # no thread was to be had, or it has closed them
        close_beside(fds)
        raise
    return found


def _look_and_close(wanted: Collection[Memory], fds: list[int]) -> tuple[Found, float]:
    began = thread_time()
    try:
        with os_errors("cannot look for holders"):
            files: list[File] = [(status.st_dev, status.st_ino) for status in map(os.fstat, fds)]
            found = holders_of(wanted, dict(zip(files, shown(fds), strict=True)))
        return found, thread_time() - began
    finally:
        while fds:
            close_fd(fds.pop())
