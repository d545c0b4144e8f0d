"""The machine in the QOM tree: /machine with what QEMU has there, and the objects that are no memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gmemd.commands.context import Gmemd
from gmemd.commands.tree import Fixed, Node
from gmemd.emulator.device_node import device_node
from gmemd.emulator.tables import DEVICES, EVERY_DEVICE, MACHINE_MEMBERS, Member
from gmemd.emulator.topology import CPU_TYPE
from gmemd.emulator.values import ON

if TYPE_CHECKING:
    from gmemd.emulator.machine import Machine

# libvirt asks for each boolean of each processor: the fewer the better.
_CPU = {"realized": ("bool", True), "hotplugged": ("bool", False)}


class MachineNode(Fixed):
    """/machine; the command line can be read though it is not listed."""

    def __init__(self, machine: Machine, properties: dict[str, tuple[str, Any]], children: dict[str, Node],
                 order: list[str]) -> None:
        super().__init__(machine.gmemd, "/machine", f"{machine.kind.name}-machine", properties, children)
        self._order = order
        self._words = machine.line.words

    def _listing(self) -> Iterator[tuple[str, str]]:
        rows = dict(super()._listing())
        return ((name, rows[name]) for name in self._order)

    def get(self, name: str) -> Any:
        return " ".join(self._words) if name == "x-command-line" else super().get(name)


def machine_node(machine: Machine) -> Fixed:
    """The node /machine."""
    gmemd, known = machine.gmemd, _known(machine)
    inside = _children(machine)
    order = ["type"]
    shown: dict[str, tuple[str, Any]] = {}
    children: dict[str, Node] = {}
    absent = {"device-memory[0]"} if not machine.device_memory_total else set()
    absent |= {"acpi-device"} if not machine.acpi else set()
    for member in _members(machine):
        if member.name in absent:
            continue
        order.append(member.name)
        if member.is_child:
            children[member.name] = inside.get(member.name) or Fixed(
                gmemd, f"/machine/{member.name}", member.type[len("child<"):-1], {})
        else:
            shown[member.name] = member.type, known.get(member.name, member.value)
    return MachineNode(machine, shown, children, order)


def _members(machine: Machine) -> list[Member]:
    nodes = "+nodes" if any(node.memdev for node in machine.line.numa) else ""
    return MACHINE_MEMBERS[machine.kind.alias + nodes if machine.kind.is_pc else "none"]


def _known(machine: Machine) -> dict[str, Any]:
    """The values of members that follow from the command line, the machine and the time."""
    line, kind = machine.line, machine.kind
    values = {member.name: (line.machine[member.name] in ON if member.type == "bool" else line.machine[member.name])
              for member in _members(machine) if member.name in line.machine}
    if line.no_acpi:
        values["acpi"] = "off"
    ram = line.ram
    most = {"slots": ram.slots, "max-size": ram.most} if ram.slots else {}
    cpus = line.cpus
    now = time.gmtime()
    backend = line.machine.get("memory-backend") or (
        kind.ram_id if machine.has_ram and not any(node.memdev for node in line.numa) else "")
    return {
        **values,
        "memory-backend": f"/objects/{backend}" if backend else "",
        "memory": {"size": machine.base_memory, **most},
        "smp": {"cpus": cpus.count, "drawers": 1, "books": 1, "sockets": cpus.sockets, "dies": cpus.dies,
                "clusters": 1, "modules": cpus.modules, "cores": cpus.cores // (cpus.dies * cpus.modules),
                "threads": cpus.threads, "maxcpus": cpus.most},
        "rtc-time": {"tm_year": now.tm_year - 1900, "tm_mon": now.tm_mon - 1, "tm_mday": now.tm_mday,
                     "tm_hour": now.tm_hour, "tm_min": now.tm_min, "tm_sec": now.tm_sec},
    }


def _children(machine: Machine) -> dict[str, Node]:
    """What below /machine has something inside."""
    plugged: dict[str, dict[str, Node]] = {"peripheral": {}, "peripheral-anon": {}}
    for container, names in machine.names.items():
        for name in reversed(list(names)):
            device = machine.devices.get(f"/machine/{container}/{name}")
            if device is not None:
                plugged[container][name] = device_node(machine, device)
    cpus: dict[str, Node] = {}
    for cpu in machine.cpus():
        cpus[cpu["qom-path"].rpartition("/")[2]] = Fixed(machine.gmemd, cpu["qom-path"], CPU_TYPE, _CPU)
    return {name: Fixed(machine.gmemd, f"/machine/{name}", "container", {}, inside)
            for name, inside in {**plugged, "unattached": cpus}.items()}


def object_nodes(machine: Machine) -> dict[str, Fixed]:
    """The nodes below /objects that are no memory."""
    nodes = {}
    for object_id, arguments in machine.kept.items():
        declared = machine.gmemd.schema.properties(arguments["qom-type"])
        shown = {name: (declared[name].qom_type, value) for name, value in arguments.items()
                 if name not in ("id", "qom-type", "data")}
        nodes[object_id] = Fixed(machine.gmemd, f"/objects/{object_id}", arguments["qom-type"], shown)
    return nodes


def properties(gmemd: Gmemd, type_name: str) -> list[dict[str, Any]]:
    """What qom-list-properties tells of a type of the machine, but for its type."""
    if type_name in gmemd.schema.object_types:
        return [{"name": member.name, "type": member.qom_type}
                for member in gmemd.schema.properties(type_name).values() if member.name not in ("qom-type", "id")]
    if type_name.endswith("-machine"):
        return [{"name": "memory-backend", "type": "string"}, {"name": "dump-guest-core", "type": "bool"},
                {"name": "acpi", "type": "OnOffAuto"}]
    return [*EVERY_DEVICE, *DEVICES[type_name].properties] if type_name in DEVICES else []
