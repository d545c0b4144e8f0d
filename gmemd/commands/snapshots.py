"""Commands on snapshots that exist: listing, verifying, flattening, deleting, handing out."""

from __future__ import annotations

import os
from collections.abc import Coroutine
from typing import Any, Final

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.change import Change, WithFds
from gmemd.changes.jobs import Job
from gmemd.changes.threads import close_beside, in_thread
from gmemd.changes.workers import run_worker
from gmemd.commands.context import Caller, Gmemd
from gmemd.commands.jobs import Work, begin, check_job
from gmemd.commands.listing import listed
from gmemd.commands.shelf import Shelf
from gmemd.errors import QmpError, close_fd, os_errors
from gmemd.kernel.syscalls import open_beneath
from gmemd.snapshots import catalogue
from gmemd.snapshots.catalogue import Entry
from gmemd.vmm.state import STATE_LIMIT

_OBJECT: Final = ("id", "qom-type", "kind", "size")  # members of MemdevSnapshotObject
_TABLES: Final = 2048  # bytes of memory to a byte of its tables, at least (snapshots/tables.py)
_MANIFEST: Final = 1 << 20  # bytes that it may take, with what file systems round up
_STATE: Final = ("bytes", "vmm", "machine")  # members of MemdevDeviceState


def query_memdev_snapshots(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
    passed = _passed(caller, arguments)
    if passed < 0 and not gmemd.snapshots.path and "name" not in arguments:
        return []

    async def look() -> Any:
        shelf = await gmemd.snapshots.open(passed, caller.uid, create=False)
        try:
            names = [shelf.find(arguments["name"]).name] if "name" in arguments else shelf.in_order()
            rows = (describe(shelf, name) for name in names)
            wanted = arguments.get("object")
            found = listed((row for row in rows if wanted in (None, row.get("object", {}).get("id"))), len(names))
            return found if isinstance(found, list) else await found
        finally:
            shelf.close()

    return look()


def describe(shelf: Shelf, name: str) -> dict[str, Any]:
    """The members of MemdevSnapshot."""
    entry = shelf.entries[name]
    if entry.problem:
        return {"name": name, "bytes": entry.bytes, "problem": entry.problem}
    manifest = entry.manifest
    saved, consistency = manifest["object"], manifest["consistency"]
    members: dict[str, Any] = {
        "name": name, "bytes": entry.bytes, "uuid": manifest["id"], "created": manifest["created"],
        "object": {"kind": "memfd"} | {member: saved[member] for member in _OBJECT if member in saved},
        "stored": manifest["parts"]["memory"]["stored"], "via": consistency["via"],
        "consistent": consistency["consistent"], "generation": manifest["generation"]}
    if "pause-ms" in consistency:
        members["pause-ms"] = consistency["pause-ms"]
    if "parent" in manifest:
        members["parent"] = manifest["parent"]["name"]
    if children := shelf.children(name):
        members["children"] = children
    if "device-state" in manifest:
        state = manifest["device-state"]
        members["device-state"] = {"vmm": "unknown"} | {member: state[member] for member in _STATE if member in state}
    return members


def memdev_snapshot_verify(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    check_job(gmemd, arguments, change)

    async def act() -> Any:
        shelf = await shelf_for(change, gmemd, caller, arguments)
        entry = shelf.usable(arguments["name"])
        use_with_parent(gmemd, change, shelf, entry, "it is being verified")
        change.judged(f"read the {entry.bytes} bytes of snapshot '{entry.name}'", whole=False)

        async def work(job: Job | None, change: Change) -> Any:
            await work_on("verify", shelf, entry.name, job)
            return {}

        return await begun(gmemd, arguments, "snapshot-verify", entry.bytes,
                         work, change, {})

    return act()


def memdev_snapshot_flatten(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    check_job(gmemd, arguments, change)

    async def act() -> Any:
        shelf = await shelf_for(change, gmemd, caller, arguments)
        entry = shelf.usable(arguments["name"])
        _check_childless(shelf, entry.name)
        use_with_parent(gmemd, change, shelf, entry, "it is being rewritten", shared=False)
        charge_saved(change, arguments, entry.manifest["object"]["size"] * len(entry.manifest["parts"]))
        verb = "cold" if arguments["cold"] else "flatten"
        change.judged(f"rewrite snapshot '{entry.name}'{' compressed' if verb == 'cold' else ''}, which then needs no"
                      " other", whole=False)

        async def work(job: Job | None, change: Change) -> Any:
            await work_on(verb, shelf, entry.name, job)
            await gmemd.snapshots.made(shelf, entry.name)
            return {}

        return await begun(gmemd, arguments, "flatten", entry.bytes, work, change, {})

    return act()


def memdev_snapshot_delete(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    name = arguments["name"]

    async def act() -> Any:
        shelf = await shelf_for(change, gmemd, caller, arguments)
        entry = shelf.find(name)
        _check_childless(shelf, name)
        gmemd.snapshots.use(change, shelf, name, "it is being deleted")
        change.judged(f"delete snapshot '{name}' and free up to {entry.bytes} bytes")
        await in_thread(_delete, shelf.fd, name)
        await gmemd.snapshots.look(shelf)
        gmemd.emit("MEMDEV_SNAPSHOT_DELETED", {"name": name})
        return {}

    return act()


def _delete(directory: int, name: str) -> None:
    with os_errors(f"cannot delete snapshot '{name}'"):
        catalogue.delete(directory, name)


def memdev_get_snapshot(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    part = arguments["part"]

    async def act() -> WithFds:
        shelf = await shelf_for(change, gmemd, caller, arguments)
        entry = shelf.usable(arguments["name"])
        found = entry.manifest.get("device-state") if part == "device-state" else entry.manifest["parts"].get(part)
        if found is None or "file" not in found:
            raise QmpError(f"snapshot '{entry.name}' has no part '{part}'")
        stored = found.get("stored", "full")
        if stored == "delta":
            raise QmpError(f"snapshot '{entry.name}' holds only what differs from"
                           f" '{entry.manifest['parent']['name']}': memdev-snapshot-flatten completes it")
        if part == "device-state":
            _check_fits(gmemd, entry)
        change.judged(f"hand out the {part} of snapshot '{entry.name}'")
        fd, size = await in_thread(_open, shelf.fd, entry.name, found["file"])
        change.undo(lambda: close_beside([fd]))
        return WithFds({"bytes": size, "stored": stored, "revocable": False}, [fd])

    return act()


def _check_fits(gmemd: Gmemd, entry: Entry) -> None:
    """Refuse a device state whose memory is an object's if that is gone, or a guest has begun to run on it."""
    manifest = entry.manifest
    if manifest["parts"]["memory"]["stored"] != "object":
        return
    saved = manifest["object"]
    backend = gmemd.objects.get(saved["id"])
    with os_errors(f"cannot examine '{saved['id']}'"):
        if backend is None or os.fstat(backend.fd).st_ino != saved.get("inode"):
            raise QmpError(f"the device state of '{entry.name}' belongs to the memory of object '{saved['id']}', "
                           "which is gone")
    if not backend.frozen and backend.generation != manifest["generation"]:
        raise QmpError(f"the device state of '{entry.name}' no longer fits: a guest has run on '{backend.id}' since")


def _open(directory: int, name: str, file: str) -> tuple[int, int]:
    with os_errors(f"cannot open '{file}' of snapshot '{name}'"):
        fd = open_beneath(directory, f"{name}/{file}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            return fd, os.fstat(fd).st_size
        except OSError:
            close_fd(fd)
            raise


# -- for all of them -----------------------------------------------------------------------------------

async def shelf_for(change: Change, gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], *,
                    create: bool = False) -> Shelf:
    """The directory that a command names, open until its change has ended."""
    shelf = await gmemd.snapshots.open(_passed(caller, arguments), caller.uid, create=create and not change.dry_run)
    change.undo(shelf.close)
    change.done(shelf.close)
    return shelf


def _passed(caller: Caller, arguments: dict[str, Any]) -> int:
    """A duplicate of the directory that a client has passed for this; -1: it means the daemon's own."""
    if "fdname" not in arguments:
        return -1
    with os_errors("cannot duplicate the descriptor"):
        return os.dup(caller.named_fds.look(arguments["fdname"]))


def check_new(gmemd: Gmemd, shelf: Shelf, name: str) -> None:
    """Refuse a name for a new snapshot that another has."""
    if gmemd.snapshots.taken(shelf, name):
        raise QmpError(f"snapshot '{name}' exists already")


def charge_saved(change: Change, arguments: dict[str, Any], size: int, *, state: bool = False) -> None:
    """Charge what a snapshot of `size` bytes in the daemon's own directory may take, until it is there and counts.

    state: with a device state.
    """
    if "fdname" not in arguments:
        change.charge({"snapshot-bytes": size + size // _TABLES + _MANIFEST + (STATE_LIMIT if state else 0)},
                      meanwhile=True)


def use_with_parent(gmemd: Gmemd, change: Change, shelf: Shelf, entry: Entry, doing: str, *,
                    shared: bool = True) -> None:
    """Note that a snapshot is used, and that its parent is read, if it is a delta; QmpError if that is missing."""
    parent = shelf.needed(entry.name)
    gmemd.snapshots.use(change, shelf, entry.name, doing, shared=shared)
    if parent is not None:
        gmemd.snapshots.use(change, shelf, parent, f"'{entry.name}' needs it, and {doing}", shared=True)


def _check_childless(shelf: Shelf, name: str) -> None:
    if children := shelf.children(name) if name in shelf.entries else []:
        raise QmpError(f"snapshot '{name}' is the parent of '{children[0]}': memdev-snapshot-flatten of that ends it")


async def begun(gmemd: Gmemd, arguments: dict[str, Any], kind: str, total: int, work: Work, change: Change,
                reply: dict[str, Any]) -> Any:
    """Do work on what is checked, or start its job: the reply."""
    started = begin(gmemd, arguments, kind, total, work, change, reply)
    return await started if isinstance(started, Coroutine) else started


async def work_on(verb: str, shelf: Shelf, name: str, job: Job | None) -> None:
    """Let a worker process read a snapshot, or store it in another form in its place."""
    await run_worker(job, verb, {"root": shelf.fd, "name": name}, [shelf.fd])


def describe_object(gmemd: Gmemd, backend: HostMemoryBackend, page: int) -> dict[str, Any]:
    """The manifest's member 'object'; page: bytes of one of its pages."""
    saved = {"id": backend.id, "qom-type": backend.qom_type, "kind": backend.kind,
             "simulated": backend.kind == "guest-memfd" and gmemd.kernel.simulated,
             "size": backend.memory_size, "page-size": page, "properties": dict(backend.properties)}
    if backend.visibility is not None:
        saved["visibility"] = backend.visibility.to_json()
    return saved
