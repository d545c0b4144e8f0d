"""The fence of a lease holder that stops writing by itself, when it is asked to by an event."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Any
from uuid import uuid4

from gmemd.changes.change import Change
from gmemd.commands.context import Caller, Gmemd
from gmemd.commands.fencing import Fence
from gmemd.errors import QmpError, os_errors
from gmemd.memory.lease import Lease
from gmemd.processes.identity import command_name


class Leased(Fence):
    """The holder of the lease has said that it does not write. It answers for those to whom it passed the memory on."""

    via = "lease"
    _lease: Lease
    _token = ""

    async def prepare(self) -> dict[str, Any]:
        lease = self.backend.lease
        if lease is None or lease.orphaned:
            raise QmpError(f"object '{self.backend.id}' is not leased")
        if not lease.fences:
            raise QmpError(f"process {lease.pid} ({command_name(lease.pid)}) took the lease of '{self.backend.id}' "
                           "without 'fences'")
        self._lease = lease
        return {"fence": str(uuid4())}

    async def stop(self, until: float) -> None:
        lease = self._lease
        self._token = (self.backend.fence or {})["fence"]
        answer: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        lease.fence, lease.answer = self._token, lambda error: None if answer.done() else answer.set_result(error)
        self.gmemd.emit("MEMDEV_PREPARE", {"id": self.backend.id, "pid": lease.pid, "fence": self._token,
                                           "deadline": self.deadline})
        try:
            async with asyncio.timeout(until - monotonic()):
                refusal = await answer
        except TimeoutError:
            raise QmpError(f"process {lease.pid} ({command_name(lease.pid)}) has not answered MEMDEV_PREPARE in "
                           f"{self.deadline} ms") from None
        finally:
            lease.fence, lease.answer = "", lambda error: None
        if refusal is not None:
            raise QmpError(f"process {lease.pid} ({command_name(lease.pid)}) does not fence '{self.backend.id}': "
                           f"{refusal}")

    async def go(self) -> None:
        if self._token:
            self.gmemd.emit("MEMDEV_DONE", {"id": self.backend.id, "fence": self._token})


def memdev_prepared(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> dict[str, Any]:
    backend = gmemd.objects.find(arguments["id"])
    lease = backend.lease
    with os_errors(f"cannot see the holder of '{backend.id}'"):
        own = lease is not None and lease.is_of(caller.pid)
    if lease is None or not own:
        raise QmpError(f"object '{backend.id}' is not leased to the calling process")
    if lease.fence != arguments["fence"]:
        raise QmpError(f"nobody waits for the fence '{arguments['fence']}' of '{backend.id}'")
    change.judged("say that nothing is written" if "error" not in arguments else "refuse to stop writing")
    lease.answer(arguments.get("error"))
    return {}
