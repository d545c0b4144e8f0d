"""The command that saves an object's memory: what is checked before, its name, and what it would do."""

from __future__ import annotations

import os
import re
import time
from typing import Any

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.change import Change
from gmemd.changes.threads import in_thread
from gmemd.commands.checkpoints import Way, way_to_save
from gmemd.commands.context import Caller, Gmemd
from gmemd.commands.fences import choose
from gmemd.commands.fencing import Fence
from gmemd.commands.jobs import check_job
from gmemd.commands.measure import with_resident
from gmemd.commands.shelf import Shelf
from gmemd.commands.snapshots import begun, charge_saved, check_new, shelf_for
from gmemd.commands.stopping import Qmp
from gmemd.errors import QmpError
from gmemd.snapshots.folder import check_name


def memdev_snapshot(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    backend = gmemd.objects.find(arguments["id"])
    check_job(gmemd, arguments, change)
    if "name" in arguments:
        check_name(arguments["name"])
    fence = choose(gmemd, caller, backend, arguments.get("fence"), protecting=True)
    if arguments["device-state"] and not isinstance(fence, Qmp):
        raise QmpError("parameter 'device-state' needs a fence by 'qmp'")
    way = way_to_save(backend, caller, arguments, change)
    change.claim(backend, "it is being saved", shared=True)
    return _begin(gmemd, caller, backend, fence, way, arguments, change)


async def _begin(gmemd: Gmemd, caller: Caller, backend: HostMemoryBackend, fence: Fence, way: Way,
                 arguments: dict[str, Any], change: Change) -> Any:
    """The checks that need the directory, then the work."""
    shelf = await shelf_for(change, gmemd, caller, arguments, create=True)
    checkpoint = arguments["device-state"] or "state" in arguments
    name = arguments.get("name") or free_name(gmemd, shelf, backend.id, checkpoint=checkpoint)
    check_new(gmemd, shelf, name)
    gmemd.snapshots.use(change, shelf, name, "it is being made")
    size = 0 if "state" in arguments else sum([piece.memory_size for piece in backend.pieces()])
    charge_saved(change, arguments, size, state=checkpoint)
    parent = _use_parent(gmemd, change, shelf, arguments["parent"], backend) if "parent" in arguments else ""
    if change.dry_run:
        change.judged(await _foretell(gmemd, backend, name, shelf), whole=False)
    save = way(gmemd, backend, fence, shelf, name, parent, arguments)
    return await begun(gmemd, arguments, "snapshot", backend.memory_size, save.work, change, {"name": name})


def free_name(gmemd: Gmemd, shelf: Shelf, object_id: str, *, checkpoint: bool) -> str:
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
