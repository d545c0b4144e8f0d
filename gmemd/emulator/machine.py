"""The machine around the memory: its type, run state, processors, devices and what it uses.

It runs nothing.  Where QEMU would wait for a guest, a cooperative one is assumed: it releases devices, uses the memory
it is offered and powers down when told to.
"""

from __future__ import annotations

import os
from itertools import count
from typing import Any

from gmemd.backends.base import HostMemoryBackend
from gmemd.commands.context import Gmemd
from gmemd.emulator.commandline import CommandLine
from gmemd.emulator.devices import Device
from gmemd.emulator.domain import Domain
from gmemd.emulator.machine_types import MACHINES, check_properties, find_type
from gmemd.emulator.topology import CPU_TYPE, NumaNode, cpu_props, node_of_cpu
from gmemd.errors import QmpError
from gmemd.qmp.ghashtable import GHashSet

GIB = 1 << 30
_PAGE = 4096  # bytes of the guest
_SLOTS_MAX = 256


class Machine:
    """The machine of one emulator; `status` is its run state in QAPI's words."""

    def __init__(self, gmemd: Gmemd, line: CommandLine, domain: Domain | None) -> None:
        self.gmemd = gmemd
        self.line = line
        self.domain = domain  # keeps objects that outlast the process; None: they do not
        self.kind = find_type(line.machine.get("type", MACHINES[0].name))
        if line.cpus.most > self.kind.cpu_max:
            raise QmpError(f"Invalid SMP CPUs {line.cpus.most}. The max CPUs supported by machine '{self.kind.name}' "
                           f"is {self.kind.cpu_max}")
        check_properties(self.kind, line)
        self.kvm = uses_kvm(line.accels)
        self.acpi = self.kind.is_pc and line.machine.get("acpi", "on") != "off" and not line.no_acpi
        self.has_ram = self.kind.is_pc or line.ram.given
        self.status = "prelaunch"
        self.mapped: set[str] = set()  # ids of the objects that the machine and its devices use
        self.devices: dict[str, Device] = {}  # by path
        self.names = {"peripheral": GHashSet(), "peripheral-anon": GHashSet()}  # of devices, as they are listed
        self.capabilities: dict[str, bool] = {}  # of migration
        self.anonymous = count()  # numbers the devices without an id
        self.actions = {"reboot": line.reboot_action, "shutdown": line.shutdown_action}

    @property
    def base_memory(self) -> int:
        """Bytes that the machine was started with."""
        return self.line.ram.size if self.has_ram else 0

    @property
    def numa(self) -> list[NumaNode]:
        """The NUMA nodes: with room for memory devices there is one even if none was specified."""
        return self.line.numa or ([NumaNode(0, "", (), "")] if self.device_memory_total else [])

    @property
    def device_memory_total(self) -> int:
        """The limit for memory devices, in bytes."""
        ram = self.line.ram
        return max(0, ram.most - ram.size) if self.kind.is_pc else 0

    @property
    def device_memory(self) -> tuple[int, int]:
        """Where memory devices begin, and how many bytes of addresses they have: a GiB more for each slot."""
        kind, ram = self.kind, self.line.ram
        above = max(0, ram.size - kind.low_of_more) if ram.size >= kind.low else 0
        return -(-(4 * GIB + above) // GIB) * GIB, self.device_memory_total + ram.slots * GIB

    @property
    def plugged_memory(self) -> int:
        """Bytes that the guest has of memory devices."""
        return sum(device.size for device in self.devices.values())

    @property
    def ram_with_dimms(self) -> int:
        """What a balloon can take from."""
        return self.base_memory + sum(device.size for device in self.devices.values() if device.kind == "dimm")

    def ram_ids(self) -> list[str]:
        """The objects that are the machine's memory; QmpError if they do not add up."""
        line = self.line
        if self.kind.is_pc and line.ram.slots > _SLOTS_MAX:
            raise QmpError(f"unsupported amount of memory slots: {line.ram.slots}")
        if self.kind.is_pc and line.ram.most % _PAGE:
            raise QmpError(f"maximum memory size must by aligned to multiple of {_PAGE} bytes")
        backend, by_node = line.machine.get("memory-backend"), any(node.memdev for node in line.numa)
        if backend and by_node:
            raise QmpError("'-machine memory-backend' and '-numa memdev' properties are mutually exclusive")
        if backend is not None:
            found = self.gmemd.objects.get(backend)
            if found is None:
                raise QmpError(f"Memory backend '{backend}' not found")
            if line.ram.given and found.size != line.ram.size:
                raise QmpError("Machine memory size does not match the size of the memory backend")
            return [backend]
        if by_node:
            return self._numa_ids()
        return [self.kind.ram_id] if self.has_ram else []

    def _numa_ids(self) -> list[str]:
        nodes = [node for node in self.line.numa if node.memdev]
        for number, node in enumerate(nodes):
            if any(node.memdev == other.memdev for other in nodes[:number]):
                raise QmpError(f"memory backend {node.memdev} can't be used multiple times.")
            if self.gmemd.objects.get(node.memdev) is None:
                raise QmpError(f"{node.where}memdev={node.memdev} is ambiguous")
            for cpu in node.cpus:
                if cpu >= self.line.cpus.most:
                    raise QmpError(f"{node.where}CPU index ({cpu}) should be smaller than maxcpus "
                                   f"({self.line.cpus.most})")
        total = sum(self.gmemd.objects.find(node.memdev).size for node in nodes)
        if total != self.line.ram.size:
            raise QmpError(f"total memory for NUMA nodes ({total:#x}) should equal RAM size ({self.line.ram.size:#x})")
        return [node.memdev for node in nodes]

    def take(self, object_id: str) -> HostMemoryBackend:
        """Use an object as memory; it cannot be deleted then. QmpError if it is in use."""
        backend = self.gmemd.objects.find(object_id)
        backend.check_idle()
        if object_id in self.mapped:
            raise QmpError(f"can't use already busy memdev: {object_id}")
        self.mapped.add(object_id)
        return backend

    def check_unused(self, object_id: str) -> None:
        """Refuse to delete an object in use."""
        if object_id in self.mapped:
            raise QmpError(f"Cannot delete host memory backend '{object_id}' which is mapped")

    def cpus(self) -> list[dict[str, Any]]:
        """CpuInfoFast of each processor."""
        if not self.kind.is_pc:
            return []
        line, thread = self.line, os.getpid()
        return [{"cpu-index": index, "qom-path": cpu_path(index), "thread-id": thread,
                 "props": cpu_props(line.cpus, self.numa, index), "qom-type": CPU_TYPE, "target": "x86_64"}
                for index in range(line.cpus.count)]

    def cpu_places(self) -> list[dict[str, Any]]:
        """HotpluggableCPU of each place, the last first as QEMU lists them."""
        line = self.line
        return [{"type": CPU_TYPE, "vcpus-count": 1, "props": cpu_props(line.cpus, self.numa, index)}
                | ({"qom-path": cpu_path(index)} if index < line.cpus.count else {})
                for index in reversed(range(line.cpus.most))]

    def numa_rows(self) -> list[tuple[int, list[int], int]]:
        """Number, processors and bytes (without plugged memory) of each NUMA node."""
        nodes = self.numa
        shared = not any(node.memdev for node in nodes)  # then it is the memory of the only one
        return [(node.number, [i for i in range(self.line.cpus.count) if node_of_cpu(nodes, i) == node.number],
                 self.gmemd.objects.find(node.memdev).size if node.memdev else self.base_memory * shared)
                for node in nodes]


def cpu_path(index: int) -> str:
    """A processor in the tree; QEMU creates something else after the first."""
    return f"/machine/unattached/device[{index + (index > 0)}]"


def uses_kvm(accels: list[str]) -> bool:
    """Whether KVM is used: requested, with no working accelerator before it; QmpError if nothing works."""
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
