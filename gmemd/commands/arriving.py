"""Commands about what arrives: objects from a stream, and the question who owns one, from either side."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from gmemd.backends.base import HostMemoryBackend
from gmemd.backends.sealed import new_memfd
from gmemd.changes.change import Change, changing
from gmemd.changes.completed import completed
from gmemd.changes.jobs import Job
from gmemd.changes.threads import beside, close_beside, in_thread
from gmemd.changes.workers import Worker, on_lines, run_worker, working
from gmemd.commands.charging import charge, check_resident
from gmemd.commands.checkpoints import Beside
from gmemd.commands.context import Caller, Gmemd
from gmemd.commands.fences import choose
from gmemd.commands.jobs import begin, check_job
from gmemd.commands.lines import Line, closing, state_file, take_line
from gmemd.commands.memdev import make
from gmemd.commands.owning import bury, change_state, drop, moves, own
from gmemd.commands.saving import free_name
from gmemd.commands.snapshots import charge_saved, memdev_snapshot_delete, shelf_for
from gmemd.commands.tombstones import forget_tombstone
from gmemd.errors import QmpError, os_errors
from gmemd.memory.moves import DROPPED, Move, answered
from gmemd.memory.piece import Aside
from gmemd.memory.ranges import RangeMap

# -- the commands ------------------------------------------------------------------------------------

def memdev_import(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    check_job(gmemd, arguments, change)
    line = take_line(caller, arguments, change)
    line.out, line.into = line.into, line.out  # what comes, comes from the first

    async def work(job: Job | None, change: Change) -> dict[str, Any]:
        head, check = await _read_head(job, line)
        arrival = Arrival(gmemd, caller, arguments, line, job, change, head, check)
        try:
            return await arrival.run()
        except QmpError as exc:
            await arrival.fail(exc.desc)
            raise
        finally:
            arrival.close()

    return begin(gmemd, arguments, "import", 0, closing(work, line), change,
                 {"id": arguments["id"]} if "id" in arguments else {})


# -- arriving ----------------------------------------------------------------------------------------

async def _read_head(job: Job | None, line: Line) -> tuple[dict[str, Any], str]:
    found = await run_worker(job, "stream-head", {"in": line.into}, line.fds, on_lines)
    return found["head"], found["check"]


class Arrival:
    """What a HEAD begins: a copy, a move, or a question."""

    def __init__(self, gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], line: Line, job: Job | None,
                 change: Change, head: dict[str, Any], check: str) -> None:
        self._gmemd = gmemd
        self._caller = caller
        self._arguments = arguments
        self._line = line
        self._job = job
        self._change = change
        self._head = head
        self._check = check
        self._heard = False  # the worker answers for itself
        self._error: QmpError | None = None
        self._state = -1  # a file with the device state
        self._checkpoint = ""  # the name of the snapshot with it

    async def run(self) -> dict[str, Any]:
        """Do it: the value of memdev-import."""
        purpose = self._head.get("purpose")
        if purpose != "copy" and self._line.out < 0:
            raise QmpError(f"the stream is a {purpose}, which needs a line for the answers")
        if purpose == "resolve":
            return await self._answer()
        if purpose not in ("copy", "move"):
            raise QmpError(f"the stream is for '{purpose}', which this gmemd does not know")
        backend = await self._make()
        if purpose == "copy":
            await self._copy(backend)
        else:
            await self._receive(backend)
        return {"id": backend.id}

    def close(self) -> None:
        """Close what it has opened."""
        close_beside([self._state] if self._state >= 0 else [])
        self._state = -1

    async def fail(self, desc: str) -> None:
        """Tell the other side that this one gives up, unless the worker has."""
        if self._line.out >= 0 and not self._heard:
            spec = {"out": self._line.out, "desc": desc}
            with suppress(QmpError):  # it has gone already
                await run_worker(None, "stream-fail", spec, self._line.fds, on_lines)

    async def _make(self) -> HostMemoryBackend:
        """Make new memory for it, not visible yet."""
        gmemd, change, described = self._gmemd, self._change, self._head["object"]
        if self._head["purpose"] == "move" and self._head.get("kept") and not gmemd.custody.keeps:
            raise QmpError("objects are not kept here, so a move could not be durable: gmemd runs with --persist off, "
                           "or without systemd and --keeper")
        backend = await self._begin(described)
        charge(gmemd, backend, change, aside=self._head.get("parts", 1) > 1)
        change.reserve()
        change.undo(lambda: beside(backend.abandon))
        await check_resident(gmemd, change, backend.size)
        await in_thread(make, gmemd, backend)
        with os_errors(f"there is no room for '{backend.id}'"):
            await in_thread(gmemd.kernel.check_headroom, self._head.get("bytes", 0), backend.fd)
        if backend.memory_size != described["size"]:
            raise QmpError(f"'{backend.id}' would have {backend.memory_size} bytes here instead of {described['size']}")
        if self._head.get("parts", 1) > 1:
            change.reserve()
            with os_errors(f"cannot make room for private bytes of '{backend.id}'"):
                backend.aside = Aside(backend, new_memfd(gmemd.kernel, f"{backend.id}[private]", backend.memory_size))
        return backend

    async def _begin(self, described: dict[str, Any]) -> HostMemoryBackend:
        """Check that it can be created, and take its id."""
        gmemd, change = self._gmemd, self._change
        object_id = self._arguments.get("id", described["id"])
        await gmemd.settler.durable()  # the deletion of what had the id before
        properties = {**described["properties"], "qom-type": described["qom-type"], "id": object_id}
        if properties["qom-type"] == "memory-backend-file":  # the file is the other host's
            properties = {"qom-type": "memory-backend-memfd", "id": object_id, "size": described["size"]}
        known = gmemd.schema.properties(properties["qom-type"])
        complete = gmemd.schema.check_object({name: value for name, value in properties.items()
                                              if name in known or name in ("qom-type", "id")})
        if object_id in gmemd.gone and self._head["purpose"] == "move":  # it comes back
            forget_tombstone(gmemd, object_id, change)
        self._caller.rights.check_type(complete["qom-type"])
        backend = gmemd.objects.begin(complete, (self._caller.uid, self._caller.pid), lambda name: "")
        change.undo(gmemd.objects.cancel, backend)
        return backend

    async def _copy(self, backend: HostMemoryBackend) -> None:
        async with self._receiver(backend) as worker:
            async for message in worker:
                self._progress(message)
                if "complete" in message:
                    self._complete(backend, message["complete"])
        self._appear(backend)
        await self._change.settle()
        self._arrived(backend)

    async def _receive(self, backend: HostMemoryBackend) -> None:
        """Be the destination of a move."""
        self._heard = True
        if self._head.get("device-state"):
            self._state = state_file()
        async with self._receiver(backend) as worker:
            async for message in worker:
                self._progress(message)
                try:
                    await self._said(backend, message, worker)
                except QmpError as exc:
                    self._error = exc
                    worker.tell({"fail": exc.desc})  # it tells the other side, and ends so
        if self._error is not None:
            raise self._error

    async def _said(self, backend: HostMemoryBackend, message: dict[str, Any], worker: Worker) -> None:
        head = self._head
        if "complete" in message:
            self._complete(backend, message["complete"])
            backend.move = Move(head["id"], "prepared", str(head.get("from", "")), int(head["generation"]))
            self._appear(backend)
            self._change.claim(backend, f"it is being moved here from {backend.move.peer}", away=True)
            await self._change.settle()
            if self._state >= 0:
                vmm = str(message["complete"].get("vmm", "a VMM"))
                self._checkpoint = await keep_state(self._gmemd, self._caller, backend, self._state, vmm)
            worker.tell({"durable": {"token": head["id"], "generation": head["generation"]}})
        elif "your" in message:
            await own(self._gmemd, backend, self._change)
            self._arrived(backend)
            worker.tell({"done": {}})
        elif "keep" in message:
            if self._checkpoint:
                await forget_state(self._gmemd, self._caller, self._checkpoint)
            await drop(self._gmemd, backend, self._change)
            raise QmpError(f"'{backend.id}' stays where it is: {message['keep'].get('why', '')}")

    def _receiver(self, backend: HostMemoryBackend) -> Any:
        parts = [[piece.fd, piece.offset, piece.memory_size] for piece in backend.pieces()]
        spec = {"parts": parts, "in": self._line.into, "out": self._line.out, "state": self._state,
                "check": self._check}
        if self._job is not None:
            self._job.total = int(self._head.get("bytes", 0))
        fds = [*self._line.fds, *(fd for fd, *_ in parts), *([self._state] if self._state >= 0 else [])]
        return working(self._job, "stream-receive", spec, fds, on_lines)

    def _progress(self, message: dict[str, Any]) -> None:
        if self._job is not None and "done" in message:
            self._job.current = message["done"]
            self._job.total = max(self._job.total, self._job.current)

    def _complete(self, backend: HostMemoryBackend, ends: dict[str, Any]) -> None:
        """Everything is here: judge what kind of copy it is, and take over what belongs to it."""
        consistency = ends.get("consistency", {})
        if not isinstance(consistency, dict):
            raise QmpError("the stream is damaged: its ENDS does not say how it was made consistent")
        if not (consistency.get("consistent", True) or self._arguments["allow-inconsistent"]):
            raise QmpError("the copy is of no particular moment, because nothing fenced it: 'allow-inconsistent' takes "
                           "it")
        if backend.visibility is not None and "visibility" in ends:
            backend.visibility = RangeMap.of(backend.memory_size, ends["visibility"])
            if backend.visibility is None:
                raise QmpError("the stream is damaged: its map of private memory is not valid")

    def _appear(self, backend: HostMemoryBackend) -> None:
        backend.foreign = True
        backend.generation = self._head.get("generation", 0)
        for piece in backend.pieces():
            self._change.keep(piece)
        self._gmemd.objects.commit(backend)
        self._change.undo(self._gmemd.objects.uncommit, backend)

    def _arrived(self, backend: HostMemoryBackend) -> None:
        more = {name: value for name, value in (("checkpoint", self._checkpoint),
                                                ("job-id", "" if self._job is None else self._job.id)) if value}
        self._gmemd.emit("MEMDEV_ARRIVED", {"id": backend.id, "generation": backend.generation, **more})

    # -- a question ------------------------------------------------------------------------------

    async def _answer(self) -> dict[str, Any]:
        """Say what this side knows of a move, having done what that decides."""
        gmemd, head = self._gmemd, self._head
        token, asked = head.get("id"), head.get("state")
        found = next(((object_id, move) for object_id, move in moves(gmemd) if move.knows(token)), None)
        if asked not in ("prepared", "moved", "kept"):
            raise QmpError(f"nothing can be answered to '{asked}'")
        object_id, move = found or (str(head.get("object", {}).get("id", "")), None)
        says, after = answered(asked, None if move is None else move.knows(token))
        latest = move is not None and move.token == token  # an earlier attempt has failed already, for good
        backend = gmemd.objects.get(object_id) if latest else None
        if backend is not None and move is not None:
            self._change.claim(backend, f"{move.peer} asks who owns it", away=True)
            await self._reach(backend, move, after)
        self._heard = True
        spec = {"in": self._line.into, "out": self._line.out, "check": self._check, "answer": {"state": says}}
        async with working(self._job, "stream-answer", spec, self._line.fds, on_lines) as worker:
            async for message in worker:
                if (says, message["told"].get("state")) == ("moved", "owned") and backend is not None \
                        and backend.move is not None:
                    await bury(gmemd, backend, backend.move.now("gone"), self._change)
        return {"id": object_id}

    async def _reach(self, backend: HostMemoryBackend, move: Move, after: str | None) -> None:
        """Be in the state that an answer says, durably."""
        if after == move.state:
            return
        if after == "owned":
            await own(self._gmemd, backend, self._change)
            self._arrived(backend)
        elif after == DROPPED:
            await drop(self._gmemd, backend, self._change)
        elif after == "kept":
            change_state(backend, move.now("kept"), self._change)
            await self._change.settle()


# -- the device state -------------------------------------------------------------------------------

async def keep_state(gmemd: Gmemd, caller: Caller, backend: HostMemoryBackend, state: int, vmm: str) -> str:
    """Make a checkpoint of a device state that has come with an object's memory; its name. QmpError."""
    async def keep(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> str:
        shelf = await shelf_for(change, gmemd, caller, {}, create=True)
        name = free_name(gmemd, shelf, backend.id, checkpoint=True)
        charge_saved(change, {}, 0, state=True)
        gmemd.snapshots.use(change, shelf, name, "it is being made")
        fence = choose(gmemd, caller, backend, {"via": "unfenced"})
        await Beside(gmemd, backend, fence, shelf, name, "", arguments, state=state, vmm=vmm,
                     pause=0.0).work(None, change)
        return name

    return str(await completed(changing(gmemd.settler, keep)(gmemd, caller, {"live": False, "cold": False})))


async def forget_state(gmemd: Gmemd, caller: Caller, name: str) -> None:
    """Delete such a checkpoint: its memory goes."""
    with suppress(QmpError):  # then it is listed, and refused, because its memory is gone
        await completed(changing(gmemd.settler, memdev_snapshot_delete)(gmemd, caller, {"name": name}))
