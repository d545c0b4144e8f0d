"""Plugging in: from the arguments of device_add or -device to a device, checked in QEMU's order.

Driver, bus, id, each property by itself, then the device's own checks against the machine.
"""

from __future__ import annotations

import contextlib
import re
from typing import Any

from gmemd.emulator.balloon import Balloon
from gmemd.emulator.buses import bus_kind
from gmemd.emulator.device_types import ABSTRACT
from gmemd.emulator.devices import Device, Wanted, not_writable
from gmemd.emulator.machine import Machine
from gmemd.emulator.memory_devices import Dimm, VirtioMem, check_block_size
from gmemd.emulator.tables import DEVICES
from gmemd.emulator.values import pci_address, read
from gmemd.errors import DEVICE_NOT_FOUND, QmpError
from gmemd.qmp.encode import member_order

CLASSES: dict[str, type[Dimm | VirtioMem | Balloon]] = {
    "pc-dimm": Dimm, "virtio-mem-pci": VirtioMem, "virtio-balloon-pci": Balloon}
is_identifier = re.compile(r"[A-Za-z][A-Za-z0-9\-._]*").fullmatch


def plug(machine: Machine, arguments: dict[str, Any], *, hotplugged: bool, text: bool = False) -> Device:
    """Create a device and plug it in; `text`: its properties were written as key=value.

    An unknown driver is accepted only from the command line.
    """
    driver = arguments.get("driver")
    if not isinstance(driver, str):
        raise QmpError("Parameter 'driver' is missing")
    _check_driver(driver, hotplugged=hotplugged)
    given = arguments.get("bus")
    bus = _find_bus(machine, driver, given if isinstance(given, str) else None, hotplugged=hotplugged)
    device_id = _check_id(machine, arguments)
    name = device_id or f"device[{next(machine.anonymous)}]"
    names = machine.names["peripheral" if device_id else "peripheral-anon"]
    names.add(name)
    try:
        wanted = _judge(machine, arguments, driver, name, bus, hotplugged=hotplugged, text=text)
        device = CLASSES[driver](machine, wanted) if driver in CLASSES else Device(wanted)
    except QmpError:
        names.discard(name, rebuild=False)
        raise
    machine.devices[device.path] = device
    return device


def unplug(machine: Machine, device: Device) -> None:
    """Remove a device; its memory object is free again."""
    del machine.devices[device.path]
    _, _, container, name = device.path.split("/")
    machine.names[container].discard(name, rebuild=False)
    machine.mapped.discard(device.memdev)


def _judge(machine: Machine, arguments: dict[str, Any], driver: str, name: str, bus: str, *, hotplugged: bool,
           text: bool) -> Wanted:
    """The specification of a device, as far as it can be checked without the device."""
    device_id = name if arguments.get("id") == name else None
    values = {key: value for key, value in arguments.items() if key not in ("driver", "bus", "id")}
    address = -1
    if driver in CLASSES:
        values = _read(machine, driver, values, device_id, text=text)
        if bus:
            address = values.pop("addr", -1)
    elif bus and isinstance(values.get("addr"), str):
        with contextlib.suppress(QmpError):  # whatever it is
            address = pci_address(driver, values["addr"])
    return Wanted(driver, device_id, name, values, hotplugged, bus, address)


def _check_driver(driver: str, *, hotplugged: bool) -> None:
    if driver in ABSTRACT:
        raise QmpError("Parameter 'driver' expects a non-abstract device type")
    if driver == "nvdimm":
        raise QmpError("nvdimm is not enabled: missing 'nvdimm' in '-M'")
    if driver not in CLASSES and hotplugged:
        raise QmpError(f"'{driver}' is not a valid device model name")


def _find_bus(machine: Machine, driver: str, bus: str | None, *, hotplugged: bool) -> str:
    """The bus that a device is plugged into; "": none."""
    if driver not in CLASSES:
        return bus or ""
    if bus is not None and bus.startswith("/"):
        raise QmpError(f"Device '{bus.split('/')[1]}' not found", DEVICE_NOT_FOUND)
    kind = bus_kind(machine, bus) if bus is not None else None
    if bus is not None and kind is None:
        raise QmpError(f"Bus '{bus}' not found")
    if driver == "pc-dimm":
        if kind is not None:
            raise QmpError(f"Device '{driver}' can't go on {kind} bus")
        if not machine.kind.is_pc:
            raise QmpError(f"Device '{driver}' can not be hotplugged on this machine")
        return ""
    if kind == "System":
        raise QmpError(f"Device '{driver}' can't go on {kind} bus")
    bus = bus or machine.kind.pci_bus
    if bus is None:
        raise QmpError(f"No 'PCI' bus found for device '{driver}'")
    if hotplugged and (bus == "pcie.0" or (bus == "pci.0" and not machine.acpi)):
        raise QmpError(f"Bus '{bus}' does not support hotplugging")
    return bus


def _check_id(machine: Machine, arguments: dict[str, Any]) -> str | None:
    device_id = arguments.get("id")
    if not isinstance(device_id, str):
        return None
    if not is_identifier(device_id):
        raise QmpError(f"Invalid qdev ID '{device_id}'")
    if f"/machine/peripheral/{device_id}" in machine.devices:
        raise QmpError(f"Duplicate device ID '{device_id}'")
    return device_id


def _read(machine: Machine, driver: str, given: dict[str, Any], own: str | None, *, text: bool) -> dict[str, Any]:
    """The values of the given properties, each checked by itself, in the order in which QEMU sets them."""
    values: dict[str, Any] = {}
    for name in member_order(given):
        value, member = given[name], DEVICES[driver].members.get(name)
        if name == "realized":
            read("bool", name, value, text=text)
            continue
        if name == "type":
            raise QmpError(f"Property '{driver}.type' is not writable")
        if member is None or member.is_child:
            raise QmpError(f"Property '{driver}.{name}' not found")
        if member.when == "never":
            raise not_writable(driver, member)
        if name == "addr" and member.type == "str":
            values[name] = pci_address(driver, value)
        elif member.type.startswith("link<"):
            values[name] = _read_link(machine, member.type, name, value, own)
        else:
            values[name] = read(member.type, name, value, text=text)
        if name == "block-size":
            check_block_size(values[name])
    return values


def _read_link(machine: Machine, kind: str, name: str, value: Any, own: str | None) -> str:
    """The id of the memory object that a path names; "": no object. `own` is the id of the device."""
    path = read(kind, name, value, text=False)
    if not path:
        return ""
    nodes = machine.gmemd.tree.matches(path)
    backends = [node.backend for node in nodes if node.backend is not None]
    if kind == "link<memory-backend>" and backends:
        return backends[0].id
    if nodes or path == own:
        raise QmpError(f"Invalid parameter type for '{name}', expected: {kind[5:-1]}")
    raise QmpError(f"Device '{path}' not found", DEVICE_NOT_FOUND)
