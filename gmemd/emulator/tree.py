"""The machine in the QOM tree: /machine with what QEMU has there, and the objects that are not memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from gmemd.commands.context import Gmemd
from gmemd.emulator.device_node import device_node
from gmemd.emulator.device_types import device_types
from gmemd.emulator.machine import Machine
from gmemd.emulator.tables import MACHINE_MEMBERS, Member
from gmemd.emulator.topology import CPU_TYPE
from gmemd.emulator.values import ON
from gmemd.objects.qom import Fixed, Node
from gmemd.schema.validate import Schema

# libvirt reads each boolean of each processor: the fewer the better.
_CPU = {"realized": ("bool", True), "hotplugged": ("bool", False)}


class MachineNode(Fixed):
    """/machine; the command line can be read although it is not listed."""

    def __init__(self, machine: Machine, inside: dict[str, Node]) -> None:
        """`inside`: the children that are not empty."""
        known = _known(machine)
        absent = {"device-memory[0]"} if not machine.device_memory_total else set()
        absent |= {"acpi-device"} if not machine.acpi else set()
        super().__init__("/machine", f"{machine.kind.name}-machine", {
            member.name: inside.get(member.name) or Fixed(f"/machine/{member.name}", member.child_type, {})
            if member.is_child else (member.type, known.get(member.name, member.value))
            for member in _members(machine) if member.name not in absent})
        self.machine = machine

    def get(self, name: str) -> Any:
        if name == "x-command-line":
            return " ".join(self.machine.line.words)
        value = super().get(name)
        if name != "rtc-time":
            return value
        now = time.gmtime()
        return {"tm_year": now.tm_year - 1900, "tm_mon": now.tm_mon - 1, "tm_mday": now.tm_mday,
                "tm_hour": now.tm_hour, "tm_min": now.tm_min, "tm_sec": now.tm_sec}


class DevicesNode(Node):
    """A container of devices."""

    def __init__(self, machine: Machine, name: str) -> None:
        super().__init__(f"/machine/{name}", "container")
        self._machine = machine
        self._names = machine.names[name]

    def child(self, name: str) -> Node | None:
        device = self._machine.devices.get(f"{self.path}/{name}")
        return None if device is None else device_node(self._machine, device)

    def members(self) -> Iterator[tuple[str, str]]:
        for name in reversed(list(self._names)):
            device = self._machine.devices.get(f"{self.path}/{name}")
            if device is not None:
                yield name, f"child<{device.driver}>"


def mount(machine: Machine) -> None:
    """Put a machine with its devices, and the types of both, into the tree."""
    tree = machine.gmemd.tree
    cpus = {cpu["qom-path"].rpartition("/")[2]: Fixed(cpu["qom-path"], CPU_TYPE, _CPU) for cpu in machine.cpus()}
    inside = {name: DevicesNode(machine, name) for name in machine.names}
    tree.mount("machine", MachineNode(machine, {
        **inside, "unattached": Fixed("/machine/unattached", "container", cpus)}), inside["peripheral"])
    tree.types.update(device_types(machine.gmemd.schema))


def machine_of(gmemd: Gmemd) -> Machine:
    """The machine, where there always is one."""
    node = gmemd.tree.resolve("/machine")
    assert isinstance(node, MachineNode)
    return node.machine


def _members(machine: Machine) -> list[Member]:
    nodes = "+nodes" if any(node.memdev for node in machine.line.numa) else ""
    return MACHINE_MEMBERS[machine.kind.alias + nodes if machine.kind.is_pc else "none"]


def _known(machine: Machine) -> dict[str, Any]:
    """The values of members that follow from the command line and the machine."""
    line, kind = machine.line, machine.kind
    values = {member.name: (line.machine[member.name] in ON if member.type == "bool" else line.machine[member.name])
              for member in _members(machine) if member.name in line.machine}
    if line.no_acpi:
        values["acpi"] = "off"
    ram = line.ram
    most = {"slots": ram.slots, "max-size": ram.most} if ram.slots else {}
    cpus = line.cpus
    backend = line.machine.get("memory-backend") or (
        kind.ram_id if machine.has_ram and not any(node.memdev for node in line.numa) else "")
    return {
        **values,
        "memory-backend": f"/objects/{backend}" if backend else "",
        "memory": {"size": machine.base_memory, **most},
        "smp": {"cpus": cpus.count, "drawers": 1, "books": 1, "sockets": cpus.sockets, "dies": cpus.dies,
                "clusters": 1, "modules": cpus.modules, "cores": cpus.cores // (cpus.dies * cpus.modules),
                "threads": cpus.threads, "maxcpus": cpus.most},
    }


def kept_node(schema: Schema, arguments: dict[str, Any]) -> Node:
    """The node of an object that is not memory, with the arguments of object-add."""
    kind, declared = arguments["qom-type"], schema.properties(arguments["qom-type"])
    return Fixed(f"/objects/{arguments['id']}", kind, {
        name: (declared[name].qom_type, value) for name, value in arguments.items()
        if name not in ("id", "qom-type", "data")})
