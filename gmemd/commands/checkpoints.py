"""Two ways of saving a guest in which gmemd does not read the object's memory while it stands still.

- The VMM sends the memory itself, by live migration: it is received into files without a name, and when the guest runs
  again a snapshot is saved from them as from an object. For that time it takes twice the room on the disk.
- Only the state of the devices is saved: the memory is that of the object itself, which no guest changes any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, Final

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.change import Change
from gmemd.changes.jobs import Job
from gmemd.changes.threads import close_beside, in_thread
from gmemd.changes.workers import Worker, report, working
from gmemd.commands.context import Caller
from gmemd.commands.fencing import Fence, uninterrupted
from gmemd.commands.lines import duplicate
from gmemd.commands.migrating import Migration
from gmemd.commands.save import Save, create_state
from gmemd.commands.stopping import Qmp
from gmemd.errors import QmpError, close_fd, os_errors
from gmemd.vmm.state import STATE_LIMIT

_CHUNK: Final = 1 << 20  # bytes

Way = Callable[..., Save]  # with the members of a Save


def way_to_save(backend: HostMemoryBackend, caller: Caller, arguments: dict[str, Any], change: Change) -> Way:
    """How the arguments of memdev-snapshot want an object to be saved; QmpError if that is not possible."""
    if "state" in arguments:
        for other in ("device-state", "migrate", "live", "cold", "parent", "fence"):
            if arguments.get(other):
                raise QmpError(f"parameter '{other}' does not go with 'state'")
        passed = arguments["state"]
        return partial(Beside, state=duplicate(caller, passed["fdname"], change), vmm=passed["vmm"],
                       pause=passed.get("pause-ms", 0) / 1000)
    if not arguments["migrate"]:
        return Save
    if not arguments["device-state"]:
        raise QmpError("parameter 'migrate' needs 'device-state'")
    if backend.visibility is not None:
        raise QmpError(f"object '{backend.id}' can be private in part, which a VMM does not send")
    return Sent


class Over(Fence):
    """What is left of a fence that was held and released."""

    def __init__(self, fence: Fence) -> None:
        super().__init__(fence.gmemd, fence.backend, fence.deadline)
        self.via, self.pause = fence.via, fence.pause

    async def hold(self) -> None:
        """Nothing: what was to be saved lies in files."""

    async def release(self) -> None:
        """Nothing."""


class Sent(Save):
    """A saving whose memory the VMM sends."""

    direct = False

    async def work(self, job: Job | None, change: Change) -> dict[str, Any]:
        async with _scratch(self.shelf.fd) as (memory, state):
            fence = await self._receive(job, memory, state)
            self._memory, self._state, self._vmm, self.fence = memory, state, fence.vmm, Over(fence)
            return await super().work(job, change)

    async def _receive(self, job: Job | None, memory: int, state: int) -> Migration:
        """Let the VMM send everything, and a worker put it into the files; the fence, which is over then."""
        assert isinstance(self.fence, Qmp)
        spec = {"memory": memory, "state": state, "size": self.backend.memory_size}
        with contextlib.ExitStack() as ends:
            with os_errors("cannot create a pipe"):
                reader, writer = os.pipe()
            fence = Migration(self.gmemd, self.backend, self.fence.deadline, self.fence.path, writer)
            fence.paths = self.fence.paths
            ends.callback(fence.close)
            ours = ends.enter_context(contextlib.ExitStack())
            ours.callback(os.close, reader)
            async with working(job, "receive", {**spec, "stream": reader}, [reader, memory, state]) as worker:
                ours.close()  # or the VMM would not notice that the worker has gone
                fence.begins = lambda names: worker.tell({"blocks": names})
                await _follow(worker, job, asyncio.ensure_future(_send(fence, worker)))
        return fence

    async def _spec(self) -> dict[str, Any]:
        return {**await super()._spec(), "live": False, "memory": {"fd": self._memory}}

    def _fds(self) -> list[int]:
        return [*super()._fds(), self._memory]

    async def _save_state(self, folder: str) -> dict[str, Any]:
        await in_thread(_copy, self._state, self.shelf.fd, folder)
        return {"vmm": self._vmm}


async def _send(fence: Migration, worker: Worker) -> None:
    """Have everything sent; what fails ends the worker, too."""
    try:
        async with fence.gmemd.snapshots.turn(fence.backend.id):
            await fence.hold()
            await fence.release()
    except BaseException:
        worker.stop()
        raise


async def _follow(worker: Worker, job: Job | None, sending: asyncio.Future[None]) -> None:
    """Wait until the worker has everything; QmpError says whose failure came first."""
    try:
        async for message in worker:
            report(job, message)
    except QmpError:
        if sending.done() and (error := sending.exception()) is not None:
            raise error from None
        raise
    finally:
        worker.stop()  # the VMM's migration fails then, unless it is complete
        await uninterrupted(asyncio.wait([sending]))
        error = sending.exception()
    if error is not None:
        raise error
    if "bytes" not in worker.result:
        raise QmpError("the VMM has sent less than a whole migration stream")


@contextlib.asynccontextmanager
async def _scratch(directory: int) -> AsyncIterator[tuple[int, int]]:
    """Two files without a name, on the file system of the snapshots."""
    fds: list[int] = []
    try:
        for _ in range(2):
            fds.append(await in_thread(_unnamed, directory))
        yield fds[0], fds[1]
    finally:
        close_beside(fds)


def _unnamed(directory: int) -> int:
    with os_errors("cannot create a file for what the VMM sends"):
        return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=directory)


# -- the memory is the object's ------------------------------------------------------------------------

class Beside(Save):
    """A saving of a device state only, which a client passes; it fits the memory as long as that has its generation."""

    direct = False

    def __init__(self, *given: Any, state: int, vmm: str, pause: float) -> None:
        """`state`: a file with it, borrowed. `pause`: seconds for which the guest stood still."""
        super().__init__(*given)
        self._state, self._vmm = state, vmm
        self.fence = Over(self.fence)
        self.fence.via, self.fence.pause = "qmp", pause
        self.arguments = {**self.arguments, "device-state": True}

    async def _spec(self) -> dict[str, Any]:
        return {name: value for name, value in (await super()._spec()).items() if name not in ("memory", "private")}

    async def _save_state(self, folder: str) -> dict[str, Any]:
        await in_thread(_copy, self._state, self.shelf.fd, folder)
        return {"vmm": self._vmm}

    def _finish(self, state: dict[str, Any]) -> dict[str, Any]:
        self._object["inode"] = os.fstat(self.backend.fd).st_ino  # of this memory, and not of another with the same id
        return {**super()._finish(state), "parts": {"memory": {"stored": "object", "bytes": 0}}}


def _copy(source: int, directory: int, folder: str) -> None:
    fd = create_state(directory, folder)
    try:
        with os_errors("cannot copy the device state"):
            at = 0
            while count := os.sendfile(fd, source, at, _CHUNK):
                at += count
                if at > STATE_LIMIT:
                    raise QmpError(f"the device state has more than {STATE_LIMIT >> 20} MiB: it would hold RAM")
    finally:
        close_fd(fd)
