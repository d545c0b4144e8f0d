"""The command that lists the holders of an object, and finding those of many objects for frequent queries."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Iterable, Sequence
from time import monotonic, thread_time
from typing import Any, Final

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.threads import close_beside, in_thread
from gmemd.commands.context import Caller, Gmemd
from gmemd.errors import QmpError, close_fd, os_errors
from gmemd.kernel.maps import shown
from gmemd.kernel.program import is_own
from gmemd.memory.lease import Lease
from gmemd.memory.runner import Runner
from gmemd.processes.holders import Holder, Memory, holders_of
from gmemd.processes.identity import PROC, command_name, start_time

FRESH: Final = 2.0  # seconds that a result is valid, at least
REST: Final = 20  # a search is not repeated before this many times the CPU time of the last one

Found = dict[HostMemoryBackend, list[Holder]]


def query_memdev_holders(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Coroutine[Any, Any, Any]:
    backend = gmemd.objects.find(arguments["id"])
    looking = look_for_holders([backend])

    async def work() -> list[dict[str, Any]]:
        return [describe_holder(holder) for holder in (await looking)[backend]]

    return work()


async def holders_now(backend: HostMemoryBackend) -> list[Holder]:
    """The processes that hold an object, without gmemd's own workers; QmpError if they cannot be found out."""
    found = await look_for_holders([backend])
    return [holder for holder in found[backend] if not is_own(holder.pid)]


async def others_now(gmemd: Gmemd, backend: HostMemoryBackend) -> list[Holder]:
    """The same without the service manager, which keeps it."""
    manager = os.getppid() if gmemd.custody.keeps else 0
    return [holder for holder in await holders_now(backend) if holder.pid != manager]


async def writers_now(gmemd: Gmemd, backend: HostMemoryBackend) -> list[Holder]:
    """Those of them that can write it; QmpError also if one that is known to use it cannot be inspected."""
    if backend.frozen:
        return []
    found = await others_now(gmemd, backend)
    for known in (backend.lease, backend.runner):
        if known is not None and known.pid not in [holder.pid for holder in found]:
            _check_inspected(backend, known)
    return [holder for holder in found if holder.writable or (holder.mapped and not holder.private_copy)]


def _check_inspected(backend: HostMemoryBackend, known: Lease | Runner) -> None:
    """Refuse to take a process for one that does not hold an object because nothing of it can be seen."""
    try:
        if start_time(known.pid) == known.start:
            os.listdir(f"{PROC}/{known.pid}/fd")
    except FileNotFoundError:  # it has ended
        pass
    except OSError as exc:
        raise QmpError(f"cannot see whether process {known.pid} ({command_name(known.pid)}) holds '{backend.id}': "
                       f"{os.strerror(exc.errno or 0)}") from exc


def look_for_holders(backends: Iterable[HostMemoryBackend]) -> Coroutine[Any, Any, Found]:
    """The holders of objects as they are now, to be awaited; QmpError if they cannot be found out."""
    sought = _Sought(backends)

    async def look() -> Found:
        return (await sought.look())[0]

    return look()


def describe_holder(holder: Holder) -> dict[str, Any]:
    """The members of MemdevHolder."""
    return {"pid": holder.pid, "uid": holder.uid, "comm": holder.comm, "fds": holder.fds, "mapped": holder.mapped,
            "writable": holder.writable, "private-copy": holder.private_copy,
            **({} if holder.cgroup is None else {"cgroup": holder.cgroup})}


class HolderFinder:
    """Keeps the result of the last search, shared by all queries."""

    def __init__(self) -> None:
        self._found: Found = {}
        self._due = 0.0
        self._lock = asyncio.Lock()
        self._looking: asyncio.Task[Found] | None = None

    async def find(self, backends: Iterable[HostMemoryBackend]) -> Found:
        """The holders of each of these objects; QmpError if they cannot be found out now."""
        async with self._lock:
            wanted = [backend for backend in backends if backend.fd >= 0]
            if monotonic() >= self._due or not self._found.keys() >= set(wanted):
                self._found, seconds = await _Sought(wanted).look()
                self._due = monotonic() + max(FRESH, REST * seconds)
            return {backend: self._found[backend] for backend in wanted}

    async def find_soon(self, backends: Sequence[HostMemoryBackend], wait: float) -> Found:
        """The same, as far as it is known within `wait` seconds."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self.find(backends))
        await asyncio.wait([self._looking], timeout=wait)
        if self._looking.done() and not self._looking.cancelled() and self._looking.exception() is not None:
            return {}  # while a search is not possible
        return {backend: self._found[backend] for backend in backends if backend in self._found}

    def close(self) -> None:
        """End a running search."""
        if self._looking is not None:
            self._looking.cancel()


class _Sought:
    """The memory of objects as it is now; call `look` afterwards."""

    def __init__(self, backends: Iterable[HostMemoryBackend]) -> None:
        self._memories: dict[HostMemoryBackend, Memory] = {}
        self._files: dict[HostMemoryBackend, int] = {}  # duplicates for those whose file system must be asked
        try:
            with os_errors("cannot look for holders"):
                for backend in backends:
                    if backend.kind == "file":
                        self._files[backend] = os.dup(backend.fd)
                    else:
                        self._memories[backend] = _memory(backend, backend.fd)
        except QmpError:
            self._give_back()
            raise

    async def look(self) -> tuple[Found, float]:
        """The holders of each, and the seconds of CPU time that the search took in a thread; QmpError if it failed."""
        try:
            found: tuple[Found, float] = await in_thread(self._look_and_close)
        except QmpError:  # no thread could be started, or it has closed them
            self._give_back()
            raise
        return found

    def _look_and_close(self) -> tuple[Found, float]:
        began = thread_time()
        try:
            with os_errors("cannot look for holders"):
                lines = dict(zip(self._files, shown(list(self._files.values())), strict=True))
                self._memories |= {backend: _memory(backend, fd) for backend, fd in self._files.items()}
                found = holders_of(list(self._memories.values()),
                                   {self._memories[backend].file: line for backend, line in lines.items()})
            return {backend: found.get(memory, []) for backend, memory in self._memories.items()}, thread_time() - began
        finally:
            while self._files:
                close_fd(self._files.popitem()[1])

    def _give_back(self) -> None:
        close_beside([self._files.popitem()[1] for _ in range(len(self._files))])


def _memory(backend: HostMemoryBackend, fd: int) -> Memory:
    status = os.fstat(fd)
    return Memory((status.st_dev, status.st_ino), backend.offset, backend.memory_size)
