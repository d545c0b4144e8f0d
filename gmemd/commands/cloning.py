"""The command that creates an object with the memory of another: its pages, or a copy of them."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.change import Change, WithFds
from gmemd.changes.jobs import Job
from gmemd.changes.threads import beside, close_beside, in_thread
from gmemd.changes.workers import run_worker
from gmemd.commands.charging import charge, check_resident
from gmemd.commands.context import Caller, Gmemd
from gmemd.commands.fences import choose
from gmemd.commands.fencing import Fence, held
from gmemd.commands.jobs import begin, check_job
from gmemd.commands.lines import state_file
from gmemd.commands.measure import item_of, occupied_by, with_resident
from gmemd.commands.memdev import added, make
from gmemd.commands.stopping import Qmp
from gmemd.commands.templates import find_template
from gmemd.errors import QmpError, os_errors
from gmemd.kernel.kernel import Kernel
from gmemd.memory.ranges import PRIVATE
from gmemd.memory.usage import Item, occupied
from gmemd.objects.names import IN_THE_HOUSE

_COPY = "only 'copy' can clone it"


def memdev_clone(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    if arguments["copy"]:
        return _begin_copy(gmemd, caller, arguments, change)
    for name in ("fence", "job-id", "device-state"):
        if arguments.get(name):
            raise QmpError(f"parameter '{name}' needs 'copy'")
    return _share(gmemd, caller, arguments, change)


def _share(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> dict[str, Any]:
    """Create a clone that has the pages of a template."""
    template = find_template(gmemd, arguments["template"])
    template.check_idle()
    _check_shareable(template)
    complete = gmemd.schema.check_object({"qom-type": "memory-backend-memfd", "id": arguments["id"], "share": False,
                                          "size": template.memory_size})
    caller.rights.check_type(complete["qom-type"])
    backend = gmemd.objects.begin(complete, (caller.uid, caller.pid), lambda name: "", dry_run=change.dry_run)
    change.undo(gmemd.objects.cancel, backend)
    backend.memory_size, backend.template = template.memory_size, _template_of(gmemd, template)
    charge(gmemd, backend, change, fd=template.fd)
    change.reserve()
    change.judged(f"create '{backend.id}' with the memory of '{template.id}', which takes none",
                  then=partial(_pretend, gmemd, template, backend))
    with os_errors(f"cannot open '{template.id}' again"):
        backend.fd = gmemd.kernel.duplicate(template.fd, readonly=True)
    change.undo(backend.close)
    return added(gmemd, backend, change)


def _template_of(gmemd: Gmemd, template: HostMemoryBackend) -> str:
    """What a clone here says of its template."""
    elsewhere = IN_THE_HOUSE if template.home is not None and template.home.tenant != gmemd.tenant else ""
    return elsewhere + (template.template or template.id)


def _pretend(gmemd: Gmemd, template: HostMemoryBackend, backend: HostMemoryBackend) -> None:
    """Make a clone visible in a trial; its descriptor is the template's, and is not closed."""
    backend.fd, backend.memory_size = template.fd, template.memory_size
    backend.template = _template_of(gmemd, template)
    gmemd.objects.restore([backend])


def _check_shareable(template: HostMemoryBackend) -> None:
    if template.kind == "guest-memfd":
        raise QmpError(f"object '{template.id}' is a guest_memfd, which cannot be mapped privately: {_COPY}")
    if template.kind == "file":
        raise QmpError(f"object '{template.id}' is a file, which takes no seals: {_COPY}")
    if template.properties.get("hugetlb"):
        raise QmpError(f"object '{template.id}' has huge pages, which every private mapping reserves in full: {_COPY}")
    if not template.frozen:
        raise QmpError(f"object '{template.id}' is not frozen: memdev-freeze makes it a template, or use 'copy'")


# -- copying -----------------------------------------------------------------------------------------

def _begin_copy(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    source = find_template(gmemd, arguments["template"])
    if source.visibility is not None and source.visibility.total(PRIVATE):
        raise QmpError(f"a part of object '{source.id}' is private: make it shared first")
    fence = choose(gmemd, caller, source, arguments.get("fence"))
    if arguments["device-state"] and (not isinstance(fence, Qmp) or "job-id" in arguments):
        raise QmpError("parameter 'device-state' needs a fence by 'qmp', and no job")
    check_job(gmemd, arguments, change)
    change.claim(source, "it is being cloned", shared=True)
    complete = _like(gmemd, source, arguments["id"])
    caller.rights.check_type(complete["qom-type"])
    backend = gmemd.objects.begin(complete, (caller.uid, caller.pid), lambda name: "",
                                  dry_run=change.dry_run)
    change.undo(gmemd.objects.cancel, backend)
    charge(gmemd, backend, change)
    change.reserve()
    if change.dry_run:
        change.judged(with_resident(gmemd, source, 0, source.memory_size,
                                    f"create '{backend.id}' and copy {{}} bytes of '{source.id}' into it"), whole=False,
                      then=partial(gmemd.objects.restore, [backend]))

    async def work(job: Job | None, change: Change) -> Any:
        return await _copy(gmemd, source, backend, fence, job, change, with_state=arguments["device-state"])

    return begin(gmemd, arguments, "clone", source.memory_size, work, change, {})


def _like(gmemd: Gmemd, source: HostMemoryBackend, object_id: str) -> dict[str, Any]:
    """The arguments of object-add for memory like that of an object; of a file and of a clone, for a memfd."""
    if source.kind == "file" or source.template:
        return gmemd.schema.check_object({"qom-type": "memory-backend-memfd", "id": object_id, "share": True,
                                          "size": source.memory_size})
    own = {**source.properties, "prealloc-context": ""}
    if "init-shared" in own:
        own["init-shared"] = True  # as all of it is now
    return {**own, "qom-type": source.qom_type, "id": object_id}


async def _copy(gmemd: Gmemd, source: HostMemoryBackend, backend: HostMemoryBackend, fence: Fence, job: Job | None,
                change: Change, *, with_state: bool) -> Any:
    change.undo(lambda: beside(backend.abandon))
    if change.budget is not None:
        populated = backend.size if backend.properties["prealloc"] else await occupied_by(gmemd.kernel, [source])
        await check_resident(gmemd, change, populated)
    await in_thread(make, gmemd, backend)
    with os_errors(f"cannot copy '{source.id}'"):
        await in_thread(_check_room, gmemd.kernel, item_of(source), backend.fd)
    if source.frozen:
        await _fill(source, backend, job)
        return added(gmemd, backend, change)
    if not with_state:
        async with held(fence):
            await _fill(source, backend, job)
        return added(gmemd, backend, change)
    assert isinstance(fence, Qmp)
    state = state_file()
    change.undo(lambda: close_beside([state]))
    async with held(fence):
        await fence.save_state(state)
        await _fill(source, backend, job)
    added(gmemd, backend, change)
    os.lseek(state, 0, os.SEEK_SET)
    return WithFds({"vmm": fence.vmm, "revocable": False}, [state])


async def _fill(source: HostMemoryBackend, backend: HostMemoryBackend, job: Job | None) -> None:
    """Copy the content of an object into a new one."""
    spec = {"source": source.fd, "offset": source.offset, "size": source.memory_size, "target": backend.fd}
    await run_worker(job, "copy", spec, [source.fd, backend.fd])


def _check_room(kernel: Kernel, item: Item, target: int) -> None:
    """Raise NoHeadroom if the copy would not fit."""
    kernel.check_headroom((occupied(kernel, item) or 0) - kernel.resident(target), target)
