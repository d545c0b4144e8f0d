"""Commands about objects and memory devices."""

from __future__ import annotations

import asyncio
from typing import Any

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.threads import in_thread
from gmemd.commands import jobs, memdev
from gmemd.commands.context import Caller, Gmemd
from gmemd.commands.qom import find_context
from gmemd.emulator.devices import Balloon, Device, MemoryDevice, follow_requests, make_device
from gmemd.emulator.domain import Domain
from gmemd.emulator.machine import Machine, machine_of
from gmemd.errors import DEVICE_NOT_ACTIVE, DEVICE_NOT_FOUND, QmpError
from gmemd.objects import BACKENDS

# What an obedient guest takes to let a device go.  A client may look for the event only after the reply:
# libvirt 12 waits 5 s in vain when both come at once.
UNPLUG_SECONDS = 0.02


def object_add(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
    machine = machine_of(gmemd)
    if arguments["qom-type"] not in BACKENDS:
        return _keep(gmemd, machine, arguments)
    if machine.domain is None:
        return memdev.object_add(gmemd, caller, arguments)
    backend = gmemd.objects.begin(arguments, (caller.uid, caller.pid), lambda name: find_context(gmemd, name))
    return _add_lasting(gmemd, machine.domain, backend, arguments)


def _keep(gmemd: Gmemd, machine: Machine, arguments: dict[str, Any]) -> dict[str, Any]:
    """Accept an object that is no memory: it is only there, by its id."""
    if arguments["qom-type"] == "secret" and ("data" in arguments) == ("file" in arguments):
        raise QmpError("'file' and 'data' are mutually exclusive" if "data" in arguments
                       else "Either 'file' or 'data' must be provided")
    gmemd.objects.reserve(arguments["id"])
    machine.kept[arguments["id"]] = arguments
    return {}


async def _add_lasting(gmemd: Gmemd, domain: Domain, backend: HostMemoryBackend, arguments: dict[str, Any]) -> Any:
    """Take the memory from the daemon that keeps it."""
    try:
        backend.fd, info = await in_thread(domain.obtain, arguments)
    except BaseException:
        gmemd.objects.cancel(backend)
        backend.abandon()
        raise
    backend.lasting = True
    backend.memory_size, backend.kind = info["size"], info["kind"]
    backend.guest_memfd_flags = info.get("guest-memfd-flags")
    backend.offset = info.get("offset", backend.properties.get("offset", 0))  # an older daemon does not say
    gmemd.objects.commit(backend)
    return {}


def object_del(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
    machine, object_id = machine_of(gmemd), arguments["id"]
    if object_id in machine.kept:
        del machine.kept[object_id]
        gmemd.objects.release(object_id)
        return {}
    machine.check_unused(object_id)
    if machine.domain is None:
        return memdev.object_del(gmemd, caller, arguments)
    gmemd.objects.find(object_id)
    return _delete_lasting(gmemd, machine.domain, object_id)


async def _delete_lasting(gmemd: Gmemd, domain: Domain, object_id: str) -> Any:
    await in_thread(domain.delete, object_id)
    gmemd.objects.remove(object_id).close()
    return {}


def memdev_delete(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
    machine = machine_of(gmemd)
    machine.check_unused(arguments["id"])
    if machine.domain is not None:
        raise QmpError(f"object '{arguments['id']}' is kept by another gmemd")
    return jobs.memdev_delete(gmemd, caller, arguments)


def query_memory_size_summary(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> dict[str, Any]:
    machine = machine_of(gmemd)
    return {"base-memory": machine.base_memory, "plugged-memory": sum(d.size for d in machine.devices.values())}


def query_memory_devices(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> list[Any]:
    devices = [device for device in machine_of(gmemd).devices.values() if isinstance(device, MemoryDevice)]
    return [{"type": device.kind, "data": device.info()} for device in sorted(devices, key=lambda device: device.addr)]


def device_add(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> dict[str, Any]:
    machine = machine_of(gmemd)
    make_device(machine, arguments, hotplugged=machine.status != "starting")
    follow_requests(machine)
    return {}


def device_del(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> dict[str, Any]:
    machine, wanted = machine_of(gmemd), arguments["id"]
    device = machine.devices.get(wanted if wanted.startswith("/") else f"/machine/peripheral/{wanted}")
    if device is None:
        raise QmpError(f"Device '{wanted}' not found", DEVICE_NOT_FOUND)
    if device.leaving:
        raise QmpError(f"Device {wanted} is already in the process of unplug")
    device.check_removal()
    device.leaving = True
    asyncio.get_running_loop().call_later(UNPLUG_SECONDS, _let_go, gmemd, device)
    return {}


def _let_go(gmemd: Gmemd, device: Device) -> None:
    machine = machine_of(gmemd)
    del machine.devices[device.path]
    machine.mapped.discard(device.memdev)
    gmemd.emit("DEVICE_DELETED", ({} if device.id is None else {"device": device.id}) | {"path": device.path})


def query_balloon(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"actual": _balloon(gmemd).actual}


def balloon(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> dict[str, Any]:
    device, value = _balloon(gmemd), arguments["value"]
    if value <= 0:
        raise QmpError("Parameter 'target' expects a size")
    actual = min(value, sum(query_memory_size_summary(gmemd, caller, {}).values()))
    if actual != device.actual:
        device.actual = actual
        gmemd.emit("BALLOON_CHANGE", {"actual": actual})
    return {}


def _balloon(gmemd: Gmemd) -> Balloon:
    for device in machine_of(gmemd).devices.values():
        if isinstance(device, Balloon):
            return device
    raise QmpError("No balloon device has been activated", DEVICE_NOT_ACTIVE)
