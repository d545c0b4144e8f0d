"""The command that saves an object's memory: a worker copies it, twice if it is live, and a fence keeps the second
time free of writers.

    worker: copies while the guest runs, if it is live; then it is ready
    fence held; the device state is written; the worker copies what has changed since; fence released
    worker: makes it durable and publishes it
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from typing import Any

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.change import Change
from gmemd.changes.jobs import Job
from gmemd.changes.threads import beside, in_thread
from gmemd.changes.workers import Worker, working
from gmemd.commands.context import Caller, Gmemd
from gmemd.commands.fences import choose
from gmemd.commands.fencing import Fence
from gmemd.commands.measure import with_resident
from gmemd.commands.shelf import Shelf
from gmemd.commands.snapshots import begun, check_new, report, shelf_for, work_on
from gmemd.commands.stopping import Qmp
from gmemd.errors import QmpError, close_fd, os_errors
from gmemd.kernel.syscalls import open_beneath
from gmemd.snapshots.folder import check_name


def memdev_snapshot(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    backend = gmemd.objects.find(arguments["id"])
    if "job-id" in arguments:
        gmemd.jobs.check_id(arguments["job-id"])
    if "name" in arguments:
        check_name(arguments["name"])
    fence = choose(gmemd, caller, backend, arguments.get("fence"))
    if arguments["device-state"] and not isinstance(fence, Qmp):
        raise QmpError("parameter 'device-state' needs a fence by 'qmp'")
    change.claim(backend, "it is being saved", shared=True)
    return _begin(gmemd, caller, backend, fence, arguments, change)


async def _begin(gmemd: Gmemd, caller: Caller, backend: HostMemoryBackend, fence: Fence, arguments: dict[str, Any],
                 change: Change) -> Any:
    """The checks that need the directory, then the work."""
    shelf = await shelf_for(gmemd, caller, arguments, change, create=True)
    name = arguments.get("name") or _free_name(gmemd, shelf, backend.id, checkpoint=arguments["device-state"])
    check_new(gmemd, shelf, name)
    gmemd.snapshots.use(change, shelf, name, "it is being made")
    parent = _use_parent(gmemd, change, shelf, arguments["parent"], backend) if "parent" in arguments else ""
    if change.dry_run:
        change.judged(await _foretell(gmemd, backend, name, shelf), whole=False)
    save = _Save(gmemd, backend, fence, shelf, name, parent, arguments)
    return await begun(gmemd, arguments, "snapshot", backend.memory_size, save.work, change, {"name": name})


def _free_name(gmemd: Gmemd, shelf: Shelf, object_id: str, *, checkpoint: bool) -> str:
    """ID@N for a checkpoint, one more than the highest there is; else ID and the time (UTC)."""
    if checkpoint:
        numbers = [int(found[1]) for name in shelf.entries
                   if (found := re.fullmatch(re.escape(object_id) + r"@([1-9][0-9]{0,8})", name))]
        number = max(numbers, default=0) + 1
        while gmemd.snapshots.taken(shelf, f"{object_id}@{number}"):
            number += 1
        name = f"{object_id}@{number}"
    else:
        name = stem = time.strftime(f"{object_id}-%Y%m%dT%H%M%S", time.gmtime())
        number = 1
        while gmemd.snapshots.taken(shelf, name):
            number += 1
            name = f"{stem}-{number}"
    check_name(name)
    return name


def _use_parent(gmemd: Gmemd, change: Change, shelf: Shelf, name: str, backend: HostMemoryBackend) -> str:
    """Check and note the parent of an increment; its name, which for a delta is that of its own parent."""
    saved = shelf.usable(name).manifest["object"]
    if saved["size"] != backend.memory_size:
        raise QmpError(f"snapshot '{name}' is of {saved['size']} bytes, and '{backend.id}' has {backend.memory_size}")
    parent = shelf.needed(name) or name
    gmemd.snapshots.use(change, shelf, parent, "another is saved as what differs from it", shared=True)
    return parent


async def _foretell(gmemd: Gmemd, backend: HostMemoryBackend, name: str, shelf: Shelf) -> str:
    """What it would write, and how long that takes as far as known."""
    sentence = await with_resident(gmemd, backend, 0, backend.memory_size, "{}")
    free = await in_thread(_free_bytes, shelf.fd if shelf.fd >= 0 else gmemd.snapshots.path)
    took = "nothing was saved yet that would tell how long it takes"
    if gmemd.snapshots.rate and sentence.isdigit():
        took = f"in about {int(sentence) / gmemd.snapshots.rate:.1f} seconds, at the rate of the last one"
    return f"save '{backend.id}' as '{name}': write up to {sentence} bytes of {free} that are free; {took}"


def _free_bytes(place: int | str) -> int:
    while isinstance(place, str) and not os.path.exists(place):
        place = os.path.dirname(place)
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize


@dataclass
class _Save:
    """One saving, once it is checked."""

    gmemd: Gmemd
    backend: HostMemoryBackend
    fence: Fence
    shelf: Shelf
    name: str
    parent: str  # "": it is no increment
    arguments: dict[str, Any]

    async def work(self, job: Job | None, change: Change) -> dict[str, Any]:
        """Do it, under the claim of `change`."""
        began = time.monotonic()
        state: dict[str, Any] = {}
        async with working(job, "save", await self._spec(), self._fds()) as worker:
            folder = (await _until(worker, job, "folder"))["folder"]
            await _until(worker, job, "ready")
            self.fence.lost = worker.stop
            async with self.gmemd.snapshots.turn(self.backend.id):
                await self.fence.hold()
                try:
                    if self.arguments["device-state"]:
                        state = await self._save_state(folder)
                    worker.tell({"pass": {"dirty": None}})
                    passed = await _until(worker, job, "passed")
                finally:
                    await self.fence.release()  # its error tells more than that of the worker it has stopped
            worker.tell({"finish": self._finish(state)})
            await _until(worker, job, "end")
        if self.arguments["cold"]:
            await work_on("cold", self.shelf, self.name, job)
        self.gmemd.snapshots.rate = passed["bytes"] / max(time.monotonic() - began, 1e-3)
        await self.gmemd.snapshots.look(self.shelf)
        self.gmemd.emit("MEMDEV_SNAPSHOT_SAVED", {"name": self.name, "id": self.backend.id,
                                                  "consistent": self.fence.consistent, "device-state": bool(state)})
        return {"name": self.name}

    async def _spec(self) -> dict[str, Any]:
        """What the worker is to do."""
        backend = self.backend
        with os_errors(f"cannot examine '{backend.id}'"):
            page = await in_thread(self.gmemd.kernel.file_page_size, backend.fd)
        self._object = describe_object(self.gmemd, backend, page)
        spec = {"root": self.shelf.fd, "name": self.name, "id": backend.id, "size": backend.memory_size,
                "live": self.arguments["live"], "memory": {"fd": backend.fd, "offset": backend.offset}}
        if backend.aside is not None:
            spec["private"] = {"fd": backend.aside.fd}
        if self.parent:
            spec["parent"] = self.parent
        return spec

    def _fds(self) -> list[int]:
        return [self.shelf.fd, *(piece.fd for piece in self.backend.pieces())]

    def _finish(self, state: dict[str, Any]) -> dict[str, Any]:
        """The members of the manifest that are known now."""
        fence = self.fence
        consistency = {"via": fence.via, "consistent": fence.consistent}
        if fence.via not in ("idle", "unfenced"):
            consistency["pause-ms"] = round(fence.pause * 1000)
        members = {"object": self._object, "consistency": consistency,
                   "generation": getattr(self.backend, "generation", 0)}
        return {**members, "device-state": state} if state else members

    async def _save_state(self, folder: str) -> dict[str, Any]:
        """Write the device state into the folder that will be the snapshot; what the manifest says of it."""
        assert isinstance(self.fence, Qmp)
        fd = await in_thread(_create, self.shelf.fd, f"{folder}/vmstate")
        try:
            await self.fence.save_state(fd)
        finally:
            await beside(lambda: close_fd(fd))
        return {"vmm": self.fence.vmm}


def describe_object(gmemd: Gmemd, backend: HostMemoryBackend, page: int) -> dict[str, Any]:
    """The manifest's member 'object'; page: bytes of one of its pages."""
    saved = {"id": backend.id, "qom-type": backend.qom_type, "kind": backend.kind,
             "simulated": backend.kind == "guest-memfd" and gmemd.kernel.simulated,
             "size": backend.memory_size, "page-size": page, "properties": dict(backend.properties)}
    if backend.visibility is not None:
        saved["visibility"] = [backend.visibility.initial, *backend.visibility.dump()]
    return saved


async def _until(worker: Worker, job: Job | None, word: str) -> dict[str, Any]:
    """Follow a worker until it says a word, or ends well; that message."""
    async for message in worker:
        report(job, message)
        if word in message:
            return message
    return worker.result


def _create(directory: int, path: str) -> int:
    with os_errors("cannot create the file for the device state"):
        return open_beneath(directory, path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
