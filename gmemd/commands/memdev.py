"""Commands about memory objects: QEMU's object-add family and gmemd's own memdev ones."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Coroutine
from typing import Any

from gmemd.backends.base import HostMemoryBackend
from gmemd.commands.context import Caller, Change, Gmemd, WithFds
from gmemd.errors import QmpError, os_errors


def object_add(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
    backend = gmemd.objects.begin(arguments, (caller.uid, caller.pid))
    try:
        if gmemd.custody is not None:
            gmemd.custody.check_room()
        if backend.blocks:
            return _add_blocking(gmemd, backend)
        _make(gmemd, backend)
        return _added(gmemd, backend)
    except BaseException:
        gmemd.objects.cancel(backend)
        raise


def _make(gmemd: Gmemd, backend: HostMemoryBackend) -> None:
    backend.allocate(gmemd.kernel)
    backend.finish(gmemd.kernel)
    if backend.properties["prealloc"]:
        backend.populate(gmemd.kernel)


async def _add_blocking(gmemd: Gmemd, backend: HostMemoryBackend) -> Any:
    """The same in a worker thread; the id is taken meanwhile, the object not yet visible."""
    try:
        await in_thread(_make, gmemd, backend)
        return _added(gmemd, backend)
    except BaseException:
        gmemd.objects.cancel(backend)
        raise


def _added(gmemd: Gmemd, backend: HostMemoryBackend) -> Any:
    custody = gmemd.custody
    if custody is None:
        gmemd.objects.commit(backend)
        return {}
    custody.add(backend)
    gmemd.objects.commit(backend)
    return Change({}, undo=lambda: gmemd.objects.remove(backend.id).close())


def object_del(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
    custody = gmemd.custody
    if custody is None:
        gmemd.objects.remove(arguments["id"]).close()
        return {}
    backend = gmemd.objects.find(arguments["id"])
    custody.remove(backend)
    gmemd.objects.remove(backend.id)
    return Change({}, undo=lambda: gmemd.objects.restore([backend]), done=backend.close)


def query_memdev(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> bytes:
    return b"[%b]" % b", ".join([backend.memdev for backend in gmemd.objects])


def query_memory_size_summary(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> dict[str, Any]:
    # No machine, no RAM of a machine: the objects are in query-memdev.
    return {"base-memory": 0, "plugged-memory": 0}


def memdev_get_fd(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> WithFds:
    backend = gmemd.objects.find(arguments["id"])
    with os_errors(f"cannot hand out '{backend.id}'"):
        fd = os.dup(backend.fd)
    backend.handed_out += 1
    return WithFds(_describe(gmemd, backend), [fd])


def query_memdev_status(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> list[Any]:
    wanted = arguments.get("id")
    backends = list(gmemd.objects) if wanted is None else [gmemd.objects.find(wanted)]
    now = time.time()
    return [_status(gmemd, backend, now) for backend in backends]


def _describe(gmemd: Gmemd, backend: HostMemoryBackend) -> dict[str, Any]:
    """What memory an object is: members of MemdevInfo."""
    info: dict[str, Any] = {"id": backend.id, "size": backend.memory_size, "kind": backend.kind,
                            "kernel": gmemd.kernel.name,
                            "simulated": backend.kind == "guest-memfd" and gmemd.kernel.simulated}
    if backend.guest_memfd_flags is not None:
        info["flags"] = backend.guest_memfd_flags
    return info


def _status(gmemd: Gmemd, backend: HostMemoryBackend, now: float) -> dict[str, Any]:
    with os_errors(f"cannot measure '{backend.id}'"):
        resident = gmemd.kernel.resident(backend.fd)
    uid, pid = backend.owner
    return {**_describe(gmemd, backend), "qom-type": backend.qom_type, "resident": resident,
            "owner": {"uid": uid, "pid": pid}, "age": max(0, int(now - backend.created)),
            "handed-out": backend.handed_out}


def device_list_properties(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> list[Any]:
    from gmemd.commands.qom import TYPES

    if arguments["typename"] in TYPES:
        raise QmpError("Parameter 'typename' expects a non-abstract device type")
    raise QmpError(f"Device '{arguments['typename']}' not found", "DeviceNotFound")


def in_thread(function: Any, *arguments: Any) -> Coroutine[Any, Any, Any]:
    """Run a blocking function in a worker thread of its own pool."""
    return asyncio.to_thread(function, *arguments)
