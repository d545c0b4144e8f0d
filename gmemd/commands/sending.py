"""Commands that send an object: a copy to a descriptor of the client, or the object itself to another gmemd.

Who owns an object that is moved is in gmemd/memory/moves.py. Every state is durable before the other side is told.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from functools import partial
from typing import Any, Final

from gmemd import __version__
from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.change import Change
from gmemd.changes.jobs import Job
from gmemd.changes.threads import close_beside, in_thread
from gmemd.changes.workers import Worker, on_lines, working
from gmemd.commands.context import Caller, Gmemd
from gmemd.commands.fences import choose
from gmemd.commands.fencing import Fence
from gmemd.commands.jobs import begin, check_job
from gmemd.commands.lease import end_lease
from gmemd.commands.lines import Line, closing, state_file, take_line
from gmemd.commands.measure import with_resident
from gmemd.commands.owning import FORMAT, bury, change_state
from gmemd.commands.runners import exchange
from gmemd.commands.stopping import Qmp
from gmemd.errors import QmpError
from gmemd.memory.moves import Move

_WITHOUT: Final = frozenset(("prealloc-context", "qom-type", "id"))  # properties that mean nothing elsewhere
_NO_POSTCOPY: Final = {
    "guest-memfd": "guest_memfd takes no userfaultfd for missing pages (Linux 7.3: EINVAL); it would need that in the "
                   "kernel, and a VMM that hands its userfaultfd over",
    "memfd": "the guest would run on memory whose missing pages are on another host, and end with that host, its gmemd "
             "or the network; it would need a VMM that hands over a userfaultfd for missing pages, which QEMU does not",
}


# -- the commands ------------------------------------------------------------------------------------

def memdev_export(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    backend = gmemd.objects.find(arguments["id"])
    fence = choose(gmemd, caller, backend, arguments.get("fence"))
    check_readable(backend)
    line = _take(gmemd, caller, backend, arguments, change, "to the descriptor")
    change.claim(backend, "it is being exported", shared=True)

    async def work(job: Job | None, change: Change) -> dict[str, Any]:
        sending = Sending(gmemd, backend, fence, line, job)
        await sending.run(arguments, await in_thread(head_of, gmemd, backend, "copy", uuid.uuid4().hex))
        return {}

    return begin(gmemd, arguments, "export", backend.memory_size, closing(work, line), change, {})


def memdev_move(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    backend = gmemd.objects.find(arguments["id"])
    backend.check_idle()
    if arguments["postcopy"]:
        raise QmpError(f"postcopy is refused: {_NO_POSTCOPY.get(backend.kind, _NO_POSTCOPY['memfd'])}")
    if backend.on_file:
        raise QmpError(f"object '{backend.id}' is a file: copy the file, and create the object there")
    check_readable(backend)
    if arguments.get("fence", {}).get("via") in ("unfenced", "write-protect"):
        raise QmpError(f"a move needs a fence that lasts: not by '{arguments['fence']['via']}'")
    fence = choose(gmemd, caller, backend, arguments.get("fence"))
    if arguments["device-state"] and not isinstance(fence, Qmp):
        raise QmpError("parameter 'device-state' needs a fence by 'qmp'")
    line = _take(gmemd, caller, backend, {"answers": arguments["fdname"], **arguments}, change,
                 f"to {arguments['to']}, then give it up and keep a tombstone")
    change.claim(backend, f"it is being moved to {arguments['to']}")

    async def work(job: Job | None, change: Change) -> dict[str, Any]:
        moving = Moving(gmemd, backend, fence, line, job, change, arguments["to"])
        if arguments["device-state"]:
            moving.state = state_file()
        try:
            await moving.run(arguments, await in_thread(moving.head))
        finally:
            close_beside([moving.state] if moving.state >= 0 else [])
        return {}

    return begin(gmemd, arguments, "move", backend.memory_size, closing(work, line), change, {})


def _take(gmemd: Gmemd, caller: Caller, backend: HostMemoryBackend, arguments: dict[str, Any], change: Change,
          where: str) -> Line:
    check_job(gmemd, arguments, change)
    where = where.replace("{", "{{").replace("}", "}}")
    return take_line(caller, arguments, change, partial(
        with_resident, gmemd, backend, 0, backend.memory_size, f"send about {{}} bytes of '{backend.id}' {where}"))


def check_readable(backend: HostMemoryBackend) -> None:
    """Refuse memory that only a guest can read."""
    if backend.guest_memfd_flags == 0 and backend.visibility is not None and not backend.visibility.total(False):
        raise QmpError(f"object '{backend.id}' is private to its guest: nothing else can read it")


# -- sending -----------------------------------------------------------------------------------------

def head_of(gmemd: Gmemd, backend: HostMemoryBackend, purpose: str, token: str) -> dict[str, Any]:
    """The members of HEAD; blocks."""
    described = {"id": backend.id, "qom-type": backend.qom_type, "kind": backend.kind, "size": backend.memory_size,
                 "simulated": gmemd.kernel.is_simulated(backend.fd),
                 "page-size": gmemd.kernel.file_page_size(backend.fd),
                 "properties": {name: value for name, value in backend.properties.items() if name not in _WITHOUT}}
    return {**FORMAT, "purpose": purpose, "id": token, "writer": f"gmemd {__version__}", "created": int(time.time()),
            "from": os.uname().nodename, "kept": backend.record is not None, "object": described,
            "bytes": _resident(gmemd, backend), "parts": len(backend.pieces())}


def _resident(gmemd: Gmemd, backend: HostMemoryBackend) -> int:
    """About how much there is to send, in bytes."""
    try:
        return sum(gmemd.kernel.resident(piece.fd, piece.offset, piece.memory_size) for piece in backend.pieces())
    except OSError:
        return backend.memory_size


class Sending:
    """One object being sent as a copy."""

    def __init__(self, gmemd: Gmemd, backend: HostMemoryBackend, fence: Fence, line: Line, job: Job | None) -> None:
        self.gmemd = gmemd
        self.backend = backend
        self.fence = fence
        self._line = line
        self._job = job
        self.state = -1  # a file for the device state, if that is sent; borrowed
        self._held = self._overdue = False

    async def run(self, arguments: dict[str, Any], head: dict[str, Any]) -> None:
        """Send it; QmpError when that fails."""
        parts = [[piece.fd, piece.offset, piece.memory_size] for piece in self.backend.pieces()]
        spec = {"parts": parts, "out": self._line.out, "in": self._line.into, "state": self.state, "head": head,
                "rounds": arguments["rounds"], "downtime": arguments["downtime"]}
        if self._job is not None:
            self._job.total = head["bytes"]
        try:
            async with working(self._job, "stream-send", spec, self._fds(parts), on_lines) as worker:
                async for message in worker:
                    await self.said(message, worker)
        except BaseException as exc:
            why = await self.let_go()
            if self._overdue and why is not None and isinstance(exc, QmpError):
                raise why from None  # the worker has only been stopped for that
            raise

    async def said(self, message: dict[str, Any], worker: Worker) -> None:
        """Do what the worker says."""
        if self._job is not None:
            self._job.current = message.get("done", self._job.current)
            self._job.total = max(message.get("total", self._job.total), self._job.current)
        if "ready" in message:
            self.fence.lost = partial(self._lost, worker)
            await self.fence.hold()
            self._held = True
            worker.tell({"pass": await self._save_state()})
        elif "passed" in message:
            worker.tell({"finish": await self.passed()})

    def _fds(self, parts: list[list[int]]) -> list[int]:
        return [*self._line.fds, *(fd for fd, *_ in parts), *([self.state] if self.state >= 0 else [])]

    async def _save_state(self) -> dict[str, Any]:
        """Have the device state written, if it is to be sent; what the worker is told of it."""
        if self.state < 0:
            return {}
        assert isinstance(self.fence, Qmp)
        return {"state": await self.fence.save_state(self.state)}

    def _lost(self, worker: Worker) -> None:
        self._overdue = True
        worker.stop()

    async def passed(self) -> dict[str, Any]:
        """Everything was read: further members of ENDS."""
        self._held = False
        await self.fence.release()
        return {**self.ends(), "consistency": {"via": self.fence.via, "consistent": self.fence.consistent,
                                               "pause-ms": int(self.fence.pause * 1000)}}

    def ends(self) -> dict[str, Any]:
        """What of the object may have changed since HEAD."""
        visibility = self.backend.visibility
        return {} if visibility is None else {"visibility": visibility.to_json()}

    async def let_go(self) -> QmpError | None:
        """It has failed: whoever was stopped goes on; what the fence has to say about it."""
        if self._held:
            self._held = False
            try:
                await self.fence.release()
            except QmpError as exc:
                return exc
        return None


class Moving(Sending):
    """One object being given to another gmemd."""

    def __init__(self, gmemd: Gmemd, backend: HostMemoryBackend, fence: Fence, line: Line, job: Job | None,
                 change: Change, peer: str) -> None:
        super().__init__(gmemd, backend, fence, line, job)
        self._change = change
        failed = () if backend.move is None else backend.move.after()
        self._move = Move(uuid.uuid4().hex, "offered", peer, backend.generation + 1, failed)
        self._given_up = False
        self._refused: QmpError | None = None  # why it was not given up, when the destination was ready for it

    def head(self) -> dict[str, Any]:
        """The members of HEAD; blocks."""
        return {**head_of(self.gmemd, self.backend, "move", self._move.token), "generation": self._move.generation,
                "device-state": self.state >= 0}

    async def run(self, arguments: dict[str, Any], head: dict[str, Any]) -> None:
        await self._become("offered")
        try:
            await super().run(arguments, head)
            if self._refused is not None:
                raise self._refused
        except QmpError as exc:
            if self._given_up:
                raise QmpError(f"'{self.backend.id}' was given up, and {self._move.peer} has not confirmed that it "
                               f"owns it: {exc.desc}") from exc
            if self._refused is None:
                with contextlib.suppress(QmpError):  # then it stays as offered, which means the same without an attempt
                    await self._become("kept")
            raise
        await bury(self.gmemd, self.backend, self._move.now("gone"), self._change)

    async def said(self, message: dict[str, Any], worker: Worker) -> None:
        await super().said(message, worker)
        if "durable" not in message:
            return
        try:
            await self._give_up(message["durable"])
        except QmpError as exc:
            self._refused = exc
            await self.let_go()
            await self._become("kept")
            worker.tell({"keep": {"token": self._move.token, "why": exc.desc}})
        else:
            worker.tell({"your": {"token": self._move.token, "generation": self._move.generation}})

    async def passed(self) -> dict[str, Any]:
        return {**self.ends(), **({"vmm": self.fence.vmm} if isinstance(self.fence, Qmp) else {})}

    async def _become(self, state: str) -> None:
        """Be in another state, durably."""
        change_state(self.backend, self._move.now(state), self._change)
        await self._change.settle()

    async def _give_up(self, said: dict[str, Any]) -> None:
        """The destination has it: this side owns it no longer, and whoever was stopped stays so."""
        backend, fenced = self.backend, self.backend.fence
        if said.get("token") != self._move.token:
            raise QmpError(f"the other side has another object than '{backend.id}'")
        await self.fence.stay()

        def undo() -> None:
            backend.fence = fenced

        self._change.undo(undo)
        backend.fence = None
        end_lease(self.gmemd, backend, self._change)
        if backend.runner is not None:
            exchange(self.gmemd, backend, None, self._change)
        await self._become("moved")
        self._held, self._given_up = False, True
        self.gmemd.emit("MEMDEV_MOVED", {"id": backend.id, "to": self._move.peer, "generation": self._move.generation})
        await self.fence.drop()
