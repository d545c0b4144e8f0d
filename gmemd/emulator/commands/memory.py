"""Commands about objects and memory devices."""

from __future__ import annotations

import asyncio
from typing import Any

from gmemd.backends.base import HostMemoryBackend
from gmemd.backends.types import BACKENDS
from gmemd.changes.change import Change
from gmemd.changes.threads import in_thread
from gmemd.commands import jobs, memdev
from gmemd.commands.context import Caller, Gmemd
from gmemd.emulator.balloon import Balloon
from gmemd.emulator.devices import Device
from gmemd.emulator.domain import Domain
from gmemd.emulator.guest import obeyed
from gmemd.emulator.memory_devices import Dimm, MemoryDevice
from gmemd.emulator.plug import plug, unplug
from gmemd.emulator.topology import CPU_TYPE
from gmemd.emulator.tree import kept_node, machine_of
from gmemd.errors import DEVICE_NOT_ACTIVE, DEVICE_NOT_FOUND, QmpError

# How long a cooperative guest takes to release a device.  A client may look for the event only after the reply:
# libvirt 12 waits 5 s in vain when both come at once.
UNPLUG_SECONDS = 0.02


def object_add(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    machine = machine_of(gmemd)
    if arguments["qom-type"] not in BACKENDS:
        return _keep(gmemd, arguments, change)
    if machine.domain is None:
        return memdev.object_add(gmemd, caller, arguments, change)
    backend = gmemd.objects.begin(arguments, (caller.uid, caller.pid), gmemd.find_context, dry_run=change.dry_run)
    change.undo(gmemd.objects.cancel, backend)
    change.judged_alone()
    return _add_lasting(gmemd, machine.domain, backend, arguments)


def _keep(gmemd: Gmemd, arguments: dict[str, Any], change: Change) -> dict[str, Any]:
    """Accept an object that is not memory: it only exists, by its id."""
    if arguments["qom-type"] == "secret" and ("data" in arguments) == ("file" in arguments):
        raise QmpError("'file' and 'data' are mutually exclusive" if "data" in arguments
                       else "Either 'file' or 'data' must be provided")
    gmemd.objects.reserve(arguments["id"])
    change.undo(gmemd.objects.release, arguments["id"])
    change.judged_alone()
    gmemd.tree.others[arguments["id"]] = kept_node(gmemd.schema, arguments)
    return {}


async def _add_lasting(gmemd: Gmemd, domain: Domain, backend: HostMemoryBackend, arguments: dict[str, Any]) -> Any:
    """Get the memory from the daemon that keeps it; meanwhile the id is taken and the object not yet visible."""
    backend.fd, info = await in_thread(domain.obtain, arguments)
    backend.lasting = True
    backend.memory_size, backend.kind = info["size"], info["kind"]
    backend.guest_memfd_flags = info.get("guest-memfd-flags")
    backend.offset = info.get("offset", backend.properties.get("offset", 0))
    gmemd.objects.commit(backend)
    return {}


def object_del(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    machine, object_id = machine_of(gmemd), arguments["id"]
    if object_id in gmemd.tree.others:
        change.judged_alone()
        del gmemd.tree.others[object_id]
        gmemd.objects.release(object_id)
        return {}
    machine.check_unused(object_id)
    if machine.domain is None:
        return memdev.object_del(gmemd, caller, arguments, change)
    backend = gmemd.objects.find(object_id)
    backend.check_idle()
    change.judged_alone()
    change.claim(backend, "it is being deleted")
    return _delete_lasting(gmemd, machine.domain, object_id)


async def _delete_lasting(gmemd: Gmemd, domain: Domain, object_id: str) -> Any:
    await in_thread(domain.delete, object_id)
    gmemd.objects.remove(object_id).detach()  # closed with the claim
    return {}


def memdev_delete(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    machine = machine_of(gmemd)
    machine.check_unused(arguments["id"])
    if machine.domain is not None:
        raise QmpError(f"object '{arguments['id']}' is kept by another gmemd")
    return jobs.memdev_delete(gmemd, caller, arguments, change)


def query_memory_size_summary(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> dict[str, Any]:
    machine = machine_of(gmemd)
    return {"base-memory": machine.base_memory, "plugged-memory": machine.plugged_memory}


def query_memory_devices(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> list[Any]:
    devices = [device for device in machine_of(gmemd).devices.values() if isinstance(device, MemoryDevice)]
    return [{"type": device.kind, "data": device.info()} for device in sorted(devices, key=lambda device: device.addr)]


def query_acpi_ospm_status(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> list[Any]:
    machine = machine_of(gmemd)
    if not machine.acpi:
        raise QmpError("command is not supported, missing ACPI device")
    dimms = {device.slot: device.named("device") for device in machine.devices.values() if isinstance(device, Dimm)}
    return [{**dimms.get(index, {}), "slot": str(index), "slot-type": "DIMM", "source": 0, "status": 0}
            for index in range(machine.line.ram.slots)] + [
        {"slot": str(index), "slot-type": "CPU", "source": 0, "status": 0} for index in range(machine.line.cpus.most)]


def device_add(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    change.judged()
    machine = machine_of(gmemd)
    plug(machine, arguments, hotplugged=True)
    return obeyed(machine)


def device_del(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> dict[str, Any]:
    change.judged()
    device = _find_device(gmemd, arguments["id"])
    if device.leaving:
        if device.pci_address < 0:
            return {}
        raise QmpError(f"Device {arguments['id']} is already in the process of unplug")
    device.check_removal()
    device.leaving = True
    asyncio.get_running_loop().call_later(UNPLUG_SECONDS, _let_go, gmemd, device)
    return {}


def _find_device(gmemd: Gmemd, wanted: str) -> Device:
    """The device with that id or path; QmpError if there is none, or it cannot be removed."""
    path = wanted if wanted.startswith("/") else f"/machine/peripheral/{wanted}"
    device = machine_of(gmemd).devices.get(path)
    if device is not None:
        return device
    try:
        node = gmemd.tree.resolve(path)
    except QmpError:
        raise QmpError(f"Device '{wanted}' not found", DEVICE_NOT_FOUND) from None
    if node.type_name == CPU_TYPE:
        raise QmpError("Boot CPU is unpluggable" if node.path.endswith("device[0]")
                       else "processors cannot be unplugged here")
    raise QmpError(f"{wanted} is not a device")


def _let_go(gmemd: Gmemd, device: Device) -> None:
    unplug(machine_of(gmemd), device)
    gmemd.emit("DEVICE_DELETED", {**device.named("device"), "path": device.path})


def query_balloon(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"actual": _balloon(gmemd).actual(machine_of(gmemd))}


def balloon(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    change.judged()
    device, value = _balloon(gmemd), arguments["value"]
    if value <= 0:
        raise QmpError("Parameter 'value' expects a size")
    machine = machine_of(gmemd)
    device.ask(machine, value)
    return obeyed(machine)


def _balloon(gmemd: Gmemd) -> Balloon:
    for device in machine_of(gmemd).devices.values():
        if isinstance(device, Balloon):
            return device
    raise QmpError("No balloon device has been activated", DEVICE_NOT_ACTIVE)
