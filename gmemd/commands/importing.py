"""The command that makes a snapshot of guest memory in a file of QEMU's migration."""

from __future__ import annotations

from typing import Any

from gmemd.changes.change import Change
from gmemd.changes.jobs import Job
from gmemd.changes.threads import in_thread
from gmemd.changes.workers import run_worker
from gmemd.commands.context import Caller, Gmemd
from gmemd.commands.jobs import check_job
from gmemd.commands.lines import duplicate
from gmemd.commands.snapshots import begun, charge_saved, check_new, describe_object, shelf_for
from gmemd.errors import os_errors
from gmemd.snapshots import folder, mapped_ram


def memdev_snapshot_import(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    name = arguments["name"]
    check_job(gmemd, arguments, change)
    folder.check_name(name)
    fd = duplicate(caller, arguments["file"], change)

    async def act() -> Any:
        shelf = await shelf_for(change, gmemd, caller, arguments, create=True)
        check_new(gmemd, shelf, name)
        gmemd.snapshots.use(change, shelf, name, "it is being made")
        block = await in_thread(_block, fd, arguments.get("block"))
        charge_saved(change, arguments, block.size)
        change.judged(f"make the snapshot '{name}' of the {block.size} bytes of '{block.name}'", whole=False)
        object_id = arguments.get("id", block.name.rpartition("/")[2])
        members = _imported(gmemd, object_id, block.size)
        spec = {"root": shelf.fd, "name": name, "file": fd, "block": block.name, "members": members}

        async def work(job: Job | None, change: Change) -> Any:
            await run_worker(job, "import", spec, [shelf.fd, fd])
            await gmemd.snapshots.made(shelf, name)
            gmemd.emit("MEMDEV_SNAPSHOT_SAVED", {"name": name, "id": object_id, "consistent": True,
                                                 "device-state": False})
            return {"name": name}

        return await begun(gmemd, arguments, "snapshot-import", block.size, work, change, {"name": name})

    return act()


def _block(fd: int, name: str | None) -> mapped_ram.Block:
    with os_errors("cannot read QEMU's file"):
        return mapped_ram.choose(fd, name)


def _imported(gmemd: Gmemd, object_id: str, size: int) -> dict[str, Any]:
    """What the manifest says of memory that was QEMU's: it comes back as a memfd."""
    complete = gmemd.schema.check_object({"qom-type": "memory-backend-memfd", "id": object_id, "size": size})
    backend = gmemd.objects.checked(complete, (-1, -1), lambda name: "")
    backend.memory_size = size
    return {"object": describe_object(gmemd, backend, gmemd.kernel.page_size),
            "consistency": {"via": "qmp", "consistent": True}}
