"""The machine around the memory: its type, run state, processors, devices and what it uses.

It runs nothing.  Where QEMU would wait for a guest, an obedient one is assumed: it lets devices go, takes the
memory it is asked to take and powers down when told to.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gmemd.backends.base import HostMemoryBackend
from gmemd.commands.context import Gmemd
from gmemd.commands.qom import Fixed
from gmemd.emulator.commandline import CommandLine
from gmemd.emulator.devices import DEVICE_TYPES, Device, device_properties
from gmemd.emulator.domain import Domain
from gmemd.emulator.topology import CPU_TYPE, cpu_props, node_of_cpu
from gmemd.errors import QmpError

GIB = 1 << 30
# libvirt asks for each boolean of each processor: the fewer the better.
_CPU = {"realized": ("bool", True), "hotplugged": ("bool", False)}
_HOLE = 0xE0000000  # RAM below 4 GiB ends there at the latest


@dataclass(frozen=True)
class MachineType:
    """A machine type of QEMU; `ram_id` is the id of the object that is its memory."""

    name: str
    alias: str = ""
    cpu_max: int = 1
    ram_id: str = "ram"
    acpi: bool = False

    @property
    def is_pc(self) -> bool:
        """Whether it has processors, slots and memory of its own accord."""
        return self.acpi


MACHINES = (
    MachineType("pc-i440fx-11.1", "pc", 255, "pc.ram", True),
    MachineType("pc-q35-11.1", "q35", 4096, "pc.ram", True),
    MachineType("none"),
)

TYPES: dict[str, str | None] = {
    "accel": "object", "kvm-accel": "accel", "tcg-accel": "accel",
    "machine": "object", "none-machine": "machine", "x86-machine": "machine", "generic-pc-machine": "x86-machine",
    **{f"{kind.name}-machine": "generic-pc-machine" for kind in MACHINES if kind.is_pc},
    "device": "object", "cpu": "device", CPU_TYPE: "cpu",
    **dict.fromkeys(DEVICE_TYPES, "device"),
    "secret": "object", "thread-context": "object",
}


def find_type(name: str) -> MachineType:
    """The machine type of that name or alias; any version of a PC is the one there is."""
    for kind in MACHINES:
        if name in (kind.name, kind.alias) or (kind.is_pc and name.startswith(kind.name.rpartition("-")[0] + "-")):
            return kind
    raise QmpError("unsupported machine type\nUse -machine help to list supported machines")


class Machine:
    """The machine of one emulator; `status` is its run state in QAPI's words."""

    types: Mapping[str, str | None] = TYPES
    abstract = frozenset({"accel", "machine", "x86-machine", "generic-pc-machine", "device", "cpu"})

    def __init__(self, gmemd: Gmemd, line: CommandLine, domain: Domain | None) -> None:
        self.gmemd = gmemd
        self.line = line
        self.domain = domain  # where objects live that outlast the process; None: in it
        self.kind = find_type(line.machine.get("type", MACHINES[0].name))
        self.kvm = uses_kvm(line.accels)
        self.acpi = self.kind.acpi and line.machine.get("acpi", "on") != "off"
        self.has_ram = self.kind.is_pc or line.ram.given
        self.status = "prelaunch"
        self.mapped: set[str] = set()  # ids of the objects that the machine and its devices use
        self.kept: dict[str, dict[str, Any]] = {}  # arguments of the objects that are no memory
        self.devices: dict[str, Device] = {}  # by path
        self.capabilities: dict[str, bool] = {}  # of migration
        self.actions = {"reboot": line.reboot_action, "shutdown": line.shutdown_action}

    @property
    def base_memory(self) -> int:
        """Bytes that the machine was started with."""
        return self.line.ram.size if self.has_ram else 0

    @property
    def device_memory(self) -> tuple[int, int]:
        """Where memory devices begin, and how many bytes of them there may be."""
        ram = self.line.ram
        above = max(0, ram.size - _HOLE)
        start = -(-(4 * GIB + above) // GIB) * GIB
        return start, max(0, ram.most - ram.size)

    def ram_ids(self) -> list[str]:
        """The objects that are the machine's memory; QmpError if they do not add up."""
        line = self.line
        backend = line.machine.get("memory-backend")
        if backend is not None:
            self._check_backend(backend)
            return [backend]
        if line.numa and any(node.memdev for node in line.numa):
            return self._numa_ids()
        return [self.kind.ram_id] if self.has_ram else []

    def _check_backend(self, backend: str) -> None:
        found = self.gmemd.objects.get(backend)
        if found is None:
            raise QmpError(f"Memory backend '{backend}' not found")
        if self.line.ram.given and found.size != self.line.ram.size:
            raise QmpError("Machine memory size does not match the size of the memory backend")

    def _numa_ids(self) -> list[str]:
        total = 0
        for node in self.line.numa:
            found = self.gmemd.objects.get(node.memdev)
            if found is None:
                raise QmpError(f"{node.where}memdev={node.memdev} is ambiguous")
            for cpu in node.cpus:
                if cpu >= self.line.cpus.most:
                    raise QmpError(f"{node.where}CPU index ({cpu}) should be smaller than maxcpus "
                                   f"({self.line.cpus.most})")
            total += found.size
        if total != self.line.ram.size:
            raise QmpError(f"total memory for NUMA nodes ({total:#x}) should equal RAM size ({self.line.ram.size:#x})")
        return [node.memdev for node in self.line.numa]

    def take(self, object_id: str) -> HostMemoryBackend:
        """Use an object as memory; it cannot be deleted then. QmpError if it is in use."""
        backend = self.gmemd.objects.find(object_id)
        if object_id in self.mapped:
            raise QmpError(f"can't use already busy memdev: {object_id}")
        self.mapped.add(object_id)
        return backend

    def check_unused(self, object_id: str) -> None:
        """Refuse to delete what is used."""
        if object_id in self.mapped:
            raise QmpError(f"Cannot delete host memory backend '{object_id}' which is mapped")

    def cpus(self) -> list[dict[str, Any]]:
        """CpuInfoFast of each processor."""
        if not self.kind.is_pc:
            return []
        line, thread = self.line, os.getpid()
        return [{"cpu-index": index, "qom-path": f"/machine/unattached/device[{index}]", "thread-id": thread,
                 "props": cpu_props(line.cpus, line.numa, index), "qom-type": CPU_TYPE, "target": "x86_64"}
                for index in range(line.cpus.count)]

    def cpu_places(self) -> list[dict[str, Any]]:
        """HotpluggableCPU of each place, the last first as QEMU lists them."""
        line = self.line
        places = []
        for index in reversed(range(line.cpus.most)):
            place = {"type": CPU_TYPE, "vcpus-count": 1, "props": cpu_props(line.cpus, line.numa, index)}
            if index < line.cpus.count:
                place["qom-path"] = f"/machine/unattached/device[{index}]"
            places.append(place)
        return places

    def numa_rows(self) -> list[tuple[int, list[int], int]]:
        """Number, processors and bytes (without what was plugged) of each NUMA node."""
        line = self.line
        return [(node.number, [i for i in range(line.cpus.count) if node_of_cpu(line.numa, i) == node.number],
                 self.gmemd.objects.find(node.memdev).size if node.memdev else self.base_memory)
                for node in line.numa]

    # -- in the QOM tree -------------------------------------------------------------------------

    def node(self) -> Fixed:
        """The node /machine."""
        gmemd, line = self.gmemd, self.line
        plugged: dict[str, dict[str, Any]] = {"peripheral": {}, "peripheral-anon": {}}
        for device in self.devices.values():
            _, _, container, name = device.path.split("/")
            plugged[container][name] = device.node(self)
        cpus = {f"device[{i}]": Fixed(gmemd, f"/machine/unattached/device[{i}]", CPU_TYPE, _CPU)
                for i in range(len(self.cpus()))}
        children = {name: Fixed(gmemd, f"/machine/{name}", "container", {}, inside)
                    for name, inside in {**plugged, "unattached": cpus}.items()}
        backend = line.machine.get("memory-backend", "")
        return Fixed(gmemd, "/machine", f"{self.kind.name}-machine", {
            "memory-backend": ("string", backend),
            "dump-guest-core": ("bool", line.machine.get("dump-guest-core", "on") != "off"),
            "acpi": ("OnOffAuto", "on" if self.acpi else "off"),
            "x-command-line": ("string", " ".join(line.words)),
        }, children)

    def object_nodes(self) -> dict[str, Fixed]:
        """The nodes below /objects that are no memory."""
        nodes = {}
        for object_id, arguments in self.kept.items():
            declared = self.gmemd.schema.properties(arguments["qom-type"])
            shown = {name: (declared[name].qom_type, value) for name, value in arguments.items()
                     if name not in ("id", "qom-type", "data")}
            nodes[object_id] = Fixed(self.gmemd, f"/objects/{object_id}", arguments["qom-type"], shown)
        return nodes

    def properties(self, type_name: str) -> list[dict[str, Any]]:
        """What qom-list-properties tells of a type of the machine."""
        if type_name in self.gmemd.schema.object_types:
            return [{"name": member.name, "type": member.qom_type}
                    for member in self.gmemd.schema.properties(type_name).values()
                    if member.name not in ("qom-type", "id")]
        if type_name.endswith("-machine"):
            return [{"name": "memory-backend", "type": "string"}, {"name": "dump-guest-core", "type": "bool"},
                    {"name": "acpi", "type": "OnOffAuto"}]
        return device_properties(type_name)


def machine_of(gmemd: Gmemd) -> Machine:
    """The machine, where there surely is one."""
    machine = gmemd.machine
    assert isinstance(machine, Machine)
    return machine


def uses_kvm(accels: list[str]) -> bool:
    """Whether KVM is used: it is asked for, and nothing that works comes before it; QmpError if nothing works."""
    for accel in accels:
        name = accel.partition(",")[0]
        if name == "tcg":
            return False
        if name == "kvm":
            try:
                os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
            except OSError as exc:
                if accel == accels[-1]:
                    raise QmpError(f"failed to initialize kvm: {os.strerror(exc.errno or 0)}") from exc
            else:
                return True
    if accels:
        raise QmpError(f"invalid accelerator {accels[-1]}")
    return False
