"""One saving of an object's memory: a worker copies it, twice if it is live, and a fence keeps the second time free of
writers.

    worker: copies while the guest runs, if it is live; then it is ready
    fence held; the device state is written; the worker copies what has changed since; fence released
    worker: makes it durable and publishes it
"""

from __future__ import annotations

import os
import time
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Any, ClassVar

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.change import Change
from gmemd.changes.jobs import Job
from gmemd.changes.threads import beside, in_thread
from gmemd.changes.workers import Worker, report, working
from gmemd.commands.context import Gmemd
from gmemd.commands.fencing import Fence
from gmemd.commands.protecting import WriteProtect
from gmemd.commands.shelf import Shelf
from gmemd.commands.snapshots import describe_object, work_on
from gmemd.commands.stopping import Qmp
from gmemd.commands.track import dirty_since, look
from gmemd.errors import QmpError, close_fd, os_errors
from gmemd.kernel.syscalls import open_beneath


@dataclass
class Save:
    """One saving, once it is checked."""

    gmemd: Gmemd
    backend: HostMemoryBackend
    fence: Fence
    shelf: Shelf
    name: str
    parent: str  # "": it is no increment
    arguments: dict[str, Any]
    direct: ClassVar[bool] = True  # the worker reads the object's own memory, while the fence is held

    async def work(self, job: Job | None, change: Change) -> dict[str, Any]:
        """Do it, under the claim of `change`."""
        began, state = time.monotonic(), {}
        since = await self._mark() if self.arguments["live"] else self.gmemd.snapshots.mark(self.backend, self._base)
        async with AsyncExitStack() as fenced:
            if isinstance(self.fence, WriteProtect):  # the worker has to have its descriptor from the start
                await self._hold(fenced)
            async with working(job, "save", await self._spec(), self._fds()) as worker:
                made = await until(worker, job, "folder")
                await until(worker, job, "ready")
                self.fence.lost = worker.stop
                if not isinstance(self.fence, WriteProtect):
                    await self._hold(fenced)
                if self.arguments["device-state"]:
                    state = await self._save_state(made["folder"])
                mark, dirty = await self._dirty(since)
                worker.tell({"pass": {"dirty": dirty}})
                passed = await until(worker, job, "passed")
                await fenced.aclose()
                worker.tell({"finish": self._finish(state)})
                await until(worker, job, "end")
        self.gmemd.snapshots.note_mark(self.backend, made["id"], mark)
        self.gmemd.snapshots.rate = passed["bytes"] / max(time.monotonic() - began, 1e-3)
        await self.gmemd.snapshots.made(self.shelf, self.name)
        self.gmemd.emit("MEMDEV_SNAPSHOT_SAVED", {"name": self.name, "id": self.backend.id,
                                                  "consistent": self.fence.consistent, "device-state": bool(state)})
        if self.arguments["cold"]:
            await self._compress(job)
        return {"name": self.name}

    async def _compress(self, job: Job | None) -> None:
        """Store what is saved, and stays so if this fails, in the compressed form."""
        try:
            await work_on("cold", self.shelf, self.name, job)
        except QmpError as exc:
            raise QmpError(f"snapshot '{self.name}' is saved, but not compressed: {exc.desc}") from exc
        await self.gmemd.snapshots.made(self.shelf, self.name)

    async def _hold(self, fenced: AsyncExitStack) -> None:
        """Hold the fence until the stack is closed, which raises what the fence has against the copy."""
        await fenced.enter_async_context(self.gmemd.snapshots.turn(self.backend.id))
        await self.fence.hold()
        fenced.push_async_callback(self.fence.release)

    @property
    def _base(self) -> str:
        """The parent's uuid; "": it is no increment."""
        return str(self.shelf.entries[self.parent].manifest["id"]) if self.parent else ""

    async def _mark(self) -> int | None:
        """The mark of now, if what is written to the object is tracked."""
        if not self.direct:
            return None
        try:
            return await look(self.gmemd, self.backend)
        except QmpError:
            return None

    async def _dirty(self, since: int | None) -> tuple[int | None, list[tuple[int, int]] | None]:
        """The mark of now, and what was written since another one; None: it is not known."""
        if since is not None and self.direct:
            with suppress(QmpError):
                return await dirty_since(self.gmemd, self.backend, since)
        return await self._mark(), None

    async def _spec(self) -> dict[str, Any]:
        """What the worker is to do."""
        backend = self.backend
        with os_errors(f"cannot examine '{backend.id}'"):
            page = await in_thread(self.gmemd.kernel.file_page_size, backend.fd)
        self._object = describe_object(self.gmemd, backend, page)
        spec = {"root": self.shelf.fd, "name": self.name, "id": backend.id, "size": backend.memory_size,
                "live": self.arguments["live"],
                "memory": {"fd": backend.fd, "offset": backend.offset, **(self.fence.protect or {})}}
        if backend.aside is not None:
            spec["private"] = {"fd": backend.aside.fd}
        if self.parent:
            spec["parent"] = self.parent
        return spec

    def _fds(self) -> list[int]:
        protect = [self.fence.protect["uffd"]] if self.fence.protect else []
        return [self.shelf.fd, *(piece.fd for piece in self.backend.pieces()), *protect]

    def _finish(self, state: dict[str, Any]) -> dict[str, Any]:
        """The members of the manifest that are known now."""
        fence = self.fence
        consistency = {"via": fence.via, "consistent": fence.consistent}
        if fence.via in ("qmp", "lease", "freeze"):  # somebody stood still
            consistency["pause-ms"] = round(fence.pause * 1000)
        members = {"object": self._object, "consistency": consistency,
                   "generation": self.backend.generation}
        return {**members, "device-state": state} if state else members

    async def _save_state(self, folder: str) -> dict[str, Any]:
        """Write the device state into the folder that will be the snapshot; what the manifest says of it."""
        assert isinstance(self.fence, Qmp)
        fd = await in_thread(create_state, self.shelf.fd, folder)
        try:
            await self.fence.save_state(fd)
        finally:
            await beside(lambda: close_fd(fd))
        return {"vmm": self.fence.vmm}


async def until(worker: Worker, job: Job | None, word: str) -> dict[str, Any]:
    """Follow a worker until it says a word, or ends well; that message."""
    async for message in worker:
        report(job, message)
        if word in message:
            return message
    return worker.result


def create_state(directory: int, folder: str) -> int:
    """Create the file of the device state in a folder that will be a snapshot; its descriptor."""
    with os_errors("cannot create the file for the device state"):
        return open_beneath(directory, f"{folder}/vmstate", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
