"""Choosing a fence: what keeps an object's memory from being written while it is copied.

    fence = choose(gmemd, caller, backend, arguments.get("fence"))   # or refused
    async with held(fence):     # or hold() and release()
        ...                     # the memory is of one moment, if fence.consistent

Where `fence.protect` is not None the reader makes that moment itself: they are members for its worker's spec.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.threads import in_thread
from gmemd.commands.context import Caller, Gmemd
from gmemd.commands.fencing import Fence
from gmemd.commands.prepared import Leased
from gmemd.commands.protecting import WriteProtect
from gmemd.commands.stopping import Freeze, Qmp
from gmemd.errors import QmpError
from gmemd.kernel.beneath import ANYWHERE, Paths
from gmemd.observe.log import log
from gmemd.processes.guard import let_go

_ONLY = {"qmp": ("qmp",), "fdname": ("write-protect",), "address": ("write-protect",)}  # member: for which kinds
_DEADLINE = 10000  # milliseconds


class Idle(Fence):
    """Nobody holds the memory, and nobody gets it meanwhile."""

    via = "idle"

    async def prepare(self) -> dict[str, Any]:
        await self._check()
        return {}

    async def go(self) -> None:
        if self._began and self.backend.kind == "file":  # which others can open without gmemd
            await self._check()

    async def still(self) -> None:
        await self._check()

    async def _check(self) -> None:
        for holder in await self.holders():
            raise QmpError(f"object '{self.backend.id}' is held by process {holder.pid} ({holder.comm})")


class Unfenced(Fence):
    """Nothing: whoever writes goes on writing."""

    via = "unfenced"
    consistent = False

    async def release(self) -> None:
        await self._end()


class Auto(Fence):
    """The first fence that is possible, chosen when it is to be held."""

    via = "auto"

    def __init__(self, gmemd: Gmemd, backend: HostMemoryBackend, deadline: int, qmp: str | None) -> None:
        super().__init__(gmemd, backend, deadline)
        self._qmp = qmp
        self.paths = ANYWHERE  # how its socket is found

    async def hold(self) -> None:
        fence = await self._choose()
        fence.lost = lambda: self.lost()
        self._chosen, self.via = fence, fence.via
        await fence.hold()

    async def release(self) -> None:
        try:
            await self._chosen.release()
        finally:
            self.pause = self._chosen.pause

    async def stay(self) -> None:
        await self._chosen.stay()

    async def drop(self) -> None:
        await self._chosen.drop()

    async def _choose(self) -> Fence:
        if not await self.holders():
            return Idle(self.gmemd, self.backend, self.deadline)
        if self._qmp is not None:
            fence = Qmp(self.gmemd, self.backend, self.deadline, self._qmp)
            fence.paths = self.paths
            return fence
        lease = self.backend.lease
        kind = Leased if lease is not None and lease.fences and not lease.orphaned else Freeze
        return kind(self.gmemd, self.backend, self.deadline)


def choose(gmemd: Gmemd, caller: Caller, backend: HostMemoryBackend, arguments: dict[str, Any] | None, *,
           protecting: bool = False) -> Fence:
    """The fence that a MemdevFence asks for (None: auto); QmpError refuses it. Nothing has happened yet.

    protecting: whether the reader heeds `protect`.
    """
    asked = {"via": "auto", "deadline": _DEADLINE, **(arguments or {})}
    via, deadline = asked["via"], asked["deadline"]
    for member, kinds in _ONLY.items():
        if member in asked and via not in kinds and not (via == "auto" and member == "qmp"):
            raise QmpError(f"parameter '{member}' is for a fence by '{kinds[0]}'")
        if member not in asked and via in kinds:
            raise QmpError(f"a fence by '{via}' needs parameter '{member}'")
    if deadline == 0:
        raise QmpError("parameter 'deadline' must not be 0")
    if via in ("qmp", "auto"):
        fence = Qmp(gmemd, backend, deadline, asked["qmp"]) if via == "qmp" else (
            Auto(gmemd, backend, deadline, asked.get("qmp")))
        fence.paths = Paths(caller.rights.root_of(os.path.abspath(asked["qmp"])) if "qmp" in asked else "")
        return fence
    if via == "write-protect":
        if not protecting:
            raise QmpError("a fence by 'write-protect' is only for memdev-snapshot")
        return WriteProtect(gmemd, caller, backend, asked)
    simple: dict[str, type[Fence]] = {"idle": Idle, "unfenced": Unfenced, "lease": Leased, "freeze": Freeze}
    return simple[via](gmemd, backend, deadline)


# -- after a crash -----------------------------------------------------------------------------------

def recover(gmemd: Gmemd) -> None:
    """Let go on what a predecessor has stopped and did not let go on: that, and nothing else."""
    for backend in list(gmemd.objects):
        if backend.fence is not None:
            gmemd.spawn(_recover(gmemd, backend))


async def _recover(gmemd: Gmemd, backend: HostMemoryBackend) -> None:
    note = backend.fence
    assert note is not None
    try:
        await in_thread(let_go, note)
    except (QmpError, OSError) as exc:
        log.error("cannot let go on what was stopped for a copy", id=backend.id, words=str(exc))
    if "fence" in note:
        gmemd.emit("MEMDEV_DONE", {"id": backend.id, "fence": note["fence"]})
    with contextlib.suppress(QmpError):  # custody's, which has logged it
        await Fence(gmemd, backend, 0).note(None)
