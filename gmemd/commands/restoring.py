"""The command that makes an object of a snapshot: new memory is filled and verified, and only then seen.

Over an existing object the new one takes its place in one change: whatever fails or is killed, one of them is there.
"""

from __future__ import annotations

from typing import Any, Final

from gmemd.backends.base import HostMemoryBackend
from gmemd.backends.sealed import new_memfd
from gmemd.changes.change import Change
from gmemd.changes.jobs import Job
from gmemd.changes.threads import beside, in_thread
from gmemd.changes.workers import report, working
from gmemd.commands.charging import charge, check_resident
from gmemd.commands.context import Caller, Gmemd
from gmemd.commands.holders import others_now
from gmemd.commands.jobs import check_job
from gmemd.commands.memdev import added, make, remove
from gmemd.commands.runners import check_runner
from gmemd.commands.shelf import Shelf
from gmemd.commands.snapshots import begun, shelf_for, use_with_parent
from gmemd.commands.templates import check_no_clones, is_template
from gmemd.errors import QmpError, os_errors
from gmemd.memory.piece import Aside
from gmemd.memory.ranges import RangeMap
from gmemd.objects.conversion import convert
from gmemd.snapshots.catalogue import Entry
from gmemd.snapshots.manifest import WITHOUT

_FILE: Final = "memory-backend-file"
_IN_PLACE_OF_FILE: Final = ("share", "policy", "host-nodes", "reserve", "dump", "merge", "prealloc", "prealloc-threads")


def memdev_restore(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    check_job(gmemd, arguments, change)
    return _begin(gmemd, caller, arguments, change)


async def _begin(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    """The checks, then the work."""
    shelf = await shelf_for(change, gmemd, caller, arguments)
    entry = shelf.usable(arguments["name"])
    _check_consistent(entry, arguments)
    object_id = arguments.get("id", entry.manifest["object"]["id"])
    former = gmemd.objects.get(object_id) if arguments["force"] else None
    if former is not None:
        await _check_unheld(gmemd, former)
        gmemd.settler.check_live(former)
    use_with_parent(gmemd, change, shelf, entry, "it is being restored")
    backend = _checked(gmemd, caller, entry, object_id)
    if former is not None:
        change.claim(former, "a snapshot is being restored over it")
    else:
        gmemd.objects.begin_as(backend, dry_run=change.dry_run)
    change.undo(gmemd.objects.cancel, backend)
    charge(gmemd, backend, change, aside="private" in entry.manifest["parts"])
    for _ in entry.manifest["parts"]:
        change.reserve()
    instead = f", in place of the one that is there, handed out {former.handed_out} times" if former is not None else ""
    change.judged(f"create '{object_id}', {backend.size} bytes, from snapshot '{entry.name}'{instead}", whole=False)
    restore = _Restore(gmemd, shelf, entry, backend, former)
    return await begun(gmemd, arguments, "restore", backend.size, restore.work, change, {"id": object_id})


def _check_consistent(entry: Entry, arguments: dict[str, Any]) -> None:
    if not entry.manifest["consistency"]["consistent"] and not arguments["allow-inconsistent"]:
        raise QmpError(f"snapshot '{entry.name}' is of no particular moment: it was saved unfenced;"
                       " 'allow-inconsistent' restores it nevertheless")
    if entry.manifest["parts"]["memory"]["stored"] == WITHOUT:
        raise QmpError(f"snapshot '{entry.name}' does not hold the memory itself: it is stored as '{WITHOUT}'")


async def _check_unheld(gmemd: Gmemd, backend: HostMemoryBackend) -> None:
    if is_template(backend):
        check_no_clones(gmemd, backend)
    check_runner(backend, but="that has to end first")
    for holder in await others_now(gmemd, backend):
        raise QmpError(f"object '{backend.id}' is held by process {holder.pid} ({holder.comm})")


def _checked(gmemd: Gmemd, caller: Caller, entry: Entry, object_id: str) -> HostMemoryBackend:
    """The new object, without memory and id yet. What was a file becomes a memfd: no file is overwritten."""
    saved = entry.manifest["object"]
    properties = {**saved.get("properties", {}), "prealloc-context": ""}
    qom_type = saved["qom-type"]
    if qom_type == _FILE:
        qom_type = "memory-backend-memfd"
        properties = {name: properties[name] for name in _IN_PLACE_OF_FILE if name in properties}
    given = {**properties, "qom-type": qom_type, "id": object_id, "size": saved["size"]}
    if "visibility" in saved and RangeMap.of(saved["size"], saved["visibility"]) is None:
        raise QmpError(f"snapshot '{entry.name}' is damaged: its map of private memory is not valid")
    complete = gmemd.schema.check_object({name: value for name, value in given.items() if value != ""})
    caller.rights.check_type(complete["qom-type"])
    return gmemd.objects.checked(complete, (caller.uid, caller.pid), lambda name: "")


class _Restore:
    """One restoring, once it is checked. `former` is the object whose place it takes, or None."""

    def __init__(self, gmemd: Gmemd, shelf: Shelf, entry: Entry, backend: HostMemoryBackend,
                 former: HostMemoryBackend | None) -> None:
        self.gmemd = gmemd
        self.shelf = shelf
        self.entry = entry
        self.backend = backend
        self.former = former
        self._handed_out = -1 if former is None else former.handed_out

    async def work(self, job: Job | None, change: Change) -> dict[str, Any]:
        """Do it."""
        gmemd, backend = self.gmemd, self.backend
        change.undo(lambda: beside(backend.abandon))
        if backend.properties["prealloc"]:
            await check_resident(gmemd, change, backend.size)
        await in_thread(self._make)
        await self._fill(job, change)
        if self.former is not None:
            await _check_unheld(gmemd, self.former)
            self._remove_former(self.former, change)
        added(gmemd, backend, change)
        if backend.aside is not None:
            change.keep(backend.aside)
        change.done(gmemd.emit, "MEMDEV_RESTORED", {"id": backend.id, "name": self.entry.name})
        return {"id": backend.id}

    def _make(self) -> None:
        """Create the memory, with what is private to the guest as it was; blocks."""
        gmemd, backend, saved = self.gmemd, self.backend, self.entry.manifest["object"]
        make(gmemd, backend)
        if backend.memory_size != saved["size"]:
            raise QmpError(f"snapshot '{self.entry.name}' is of {saved['size']} bytes, which are not a whole number of"
                           f" pages of '{backend.id}'")
        with os_errors(f"cannot create '{backend.id}'"):
            if backend.visibility is not None and "visibility" in saved:
                visibility = RangeMap.of(backend.memory_size, saved["visibility"])
                assert visibility is not None
                for start, length, state in visibility.ranges():
                    convert(backend, gmemd.kernel, start, length, state, preserve=False)
            if "private" in self.entry.manifest["parts"]:
                fd = new_memfd(gmemd.kernel, f"{backend.id}[private]", backend.memory_size)
                backend.aside = Aside(backend, fd)

    async def _fill(self, job: Job | None, change: Change) -> None:
        backend = self.backend
        spec = {"root": self.shelf.fd, "name": self.entry.name, "id": backend.id,
                "memory": {"fd": backend.fd, "offset": backend.offset}}
        if backend.aside is not None:
            spec["private"] = {"fd": backend.aside.fd}
        fds = [self.shelf.fd, *(piece.fd for piece in backend.pieces())]
        async with working(job, "restore", spec, fds) as worker:
            async for message in worker:
                report(job, message)
                if "total" in message and not backend.properties["prealloc"]:
                    await check_resident(self.gmemd, change, message["total"])
                    await in_thread(self._check_room, message["total"])

    def _check_room(self, blocks: int) -> None:
        """Refuse what there is not enough memory for; `blocks`: bytes of the blocks that are not all zeros."""
        entries = [self.entry]
        if parent := self.shelf.needed(self.entry.name):
            entries.append(self.shelf.entries[parent])
        parts = [part for entry in entries for part in entry.manifest["parts"].values()]
        stored = sum([blocks if part["stored"] == "cold" else part["bytes"] for part in parts])
        with os_errors(f"cannot restore snapshot '{self.entry.name}'"):
            self.gmemd.kernel.check_headroom(min(blocks, stored), self.backend.fd)

    def _remove_former(self, former: HostMemoryBackend, change: Change) -> None:
        """Make room for the new one, in the same change."""
        if former.handed_out != self._handed_out:
            raise QmpError(f"object '{former.id}' was handed out meanwhile")
        change.release(former)
        remove(self.gmemd, former, change)
        self.backend.generation = former.generation + 1  # device states of the former memory do not fit this one
        self.gmemd.objects.take(self.backend)
