"""Dimms and virtio-mem: memory objects that the guest sees at guest addresses.

Follows QEMU's hw/mem/memory-device.c, pc-dimm.c and hw/virtio/virtio-mem.c: the order of the checks is visible.
"""

from __future__ import annotations

from typing import Any

from gmemd.backends.base import HostMemoryBackend
from gmemd.emulator.buses import take_pci_address
from gmemd.emulator.devices import Device, Wanted
from gmemd.emulator.machine import Machine
from gmemd.emulator.values import read
from gmemd.errors import QmpError

HUGE_PAGE = 2 << 20  # bytes: what QEMU aligns memory without a file to
LEAST_BLOCK = 1 << 20  # bytes of virtio-mem
BLOCK = 2 << 20  # bytes of it, by default


class MemoryDevice(Device):
    """What both share: an object, a NUMA node, a range of guest addresses."""

    address = "addr"  # the property that sets it
    addr = 0

    def find_backend(self, machine: Machine) -> HostMemoryBackend:
        """The memory object; QmpError if none was given."""
        backend = machine.gmemd.objects.get(self.values.get("memdev", ""))
        if backend is None:
            raise QmpError("'memdev' property must be set")
        self.memdev, self.bytes = backend.id, backend.size
        return backend

    def place(self, machine: Machine, backend: HostMemoryBackend, alignment: int) -> None:
        """Find guest addresses for it: the requested ones, or the first free ones."""
        others = sorted((d for d in machine.devices.values() if isinstance(d, MemoryDevice)), key=lambda d: d.addr)
        used, total = sum(other.bytes for other in others), machine.device_memory_total
        if used + self.bytes > total:
            raise QmpError(f"not enough space, currently {used:#x} in use of total space for memory devices {total:#x}")
        own = backing_alignment(machine, backend)
        if self.bytes % own:
            raise QmpError(f"backend memory size must be multiple of {own:#x}")
        self.addr = self._find_place(machine, others, max(alignment, own))

    def _find_place(self, machine: Machine, others: list[MemoryDevice], alignment: int) -> int:
        (start, size), wanted = machine.device_memory, self.values.get(self.address, 0)
        addr: int = wanted or -(-start // alignment) * alignment
        if addr % alignment:
            raise QmpError(f"address must be aligned to {alignment:#x} bytes")
        if wanted and (wanted < start or wanted + self.bytes > start + size):
            raise QmpError(f"can't add memory device [{wanted:#x}:{self.bytes:#x}], usable range for memory devices "
                           f"[{start:#x}:{size:#x}]")
        for other in others:
            if addr < other.addr + other.bytes and other.addr < addr + self.bytes:
                if wanted:
                    raise QmpError(f"address range conflicts with memory device id='{other}'")
                addr = -(-(other.addr + other.bytes) // alignment) * alignment
        if addr + self.bytes > start + size:
            raise QmpError("could not find position in guest address space for memory device - memory fragmented due "
                           "to alignments")
        return addr

    def info(self) -> dict[str, Any]:
        """Its entry in query-memory-devices."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        return {**self.info(), self.address: self.addr}


def backing_alignment(machine: Machine, backend: HostMemoryBackend) -> int:
    """What size and address of an object's memory are multiples of: pages of its file, or what `align` says."""
    if backend.qom_type == "memory-backend-ram":
        return HUGE_PAGE
    align: int = backend.properties.get("align", 0)
    return max(machine.gmemd.kernel.file_page_size(backend.fd), align)


class Dimm(MemoryDevice):
    """A pc-dimm."""

    kind = "dimm"

    def __init__(self, machine: Machine, wanted: Wanted) -> None:
        super().__init__(wanted)
        if not machine.acpi:
            raise QmpError("memory hotplug is not enabled: missing acpi device or acpi disabled")
        self.slot = self._find_slot(machine)
        backend = self.find_backend(machine)
        self.place(machine, backend, 1)
        self.node_number = self.values.get("node", 0)
        nodes = max(1, len(machine.numa))
        if self.node_number >= nodes:
            raise QmpError(f"'DIMM property node has value {self.node_number}' which exceeds the number of numa nodes: "
                           f"{nodes}")
        machine.take(self.memdev)
        self.size = self.bytes

    def _find_slot(self, machine: Machine) -> int:
        slots, slot = machine.line.ram.slots, int(self.values.get("slot", -1))
        if slot != -1 and not 0 <= slot < slots:
            raise QmpError(f"invalid slot number {slot}, valid range is [0-{(slots - 1) % (1 << 64)}]")
        taken = {device.slot for device in machine.devices.values() if isinstance(device, Dimm)}
        if slot in taken:
            raise QmpError(f"slot {slot} is busy")
        if slot != -1:
            return slot
        if not slots:
            raise QmpError("no slots where allocated, please specify the 'slots' option")
        free = [number for number in range(slots) if number not in taken]
        if not free:
            raise QmpError("no free slots available")
        return free[0]

    def info(self) -> dict[str, Any]:
        return {"memdev": f"/objects/{self.memdev}", "addr": self.addr, "size": self.bytes, "slot": self.slot,
                "node": self.node_number, "hotplugged": self.hotplugged, "hotpluggable": True, **self.named()}


def check_block_size(value: int) -> None:
    """Refuse an invalid block size of virtio-mem."""
    if value < LEAST_BLOCK:
        raise QmpError(f"'block-size' property has to be at least {LEAST_BLOCK:#x}")
    if value & (value - 1):
        raise QmpError("'block-size' property has to be a power of two")


class VirtioMem(MemoryDevice):
    """A virtio-mem-pci; while it runs, the guest uses the requested size at once."""

    kind = "virtio-mem"
    address = "memaddr"

    def __init__(self, machine: Machine, wanted: Wanted) -> None:
        super().__init__(wanted)
        if not machine.device_memory_total:
            raise QmpError("the configuration is not prepared for memory devices (e.g., for memory hotplug), consider "
                           "specifying the maxmem option")
        backend = self.find_backend(machine)
        own = machine.gmemd.kernel.file_page_size(backend.fd)
        self.block = self.values.get("block-size", max(BLOCK, own))
        self.place(machine, backend, max(self.block, BLOCK))
        self.pci_address = take_pci_address(machine, wanted)
        self.node_number = self.values.get("node", 0)
        self.requested = self.values.get("requested-size", 0)
        self.shrinking = False  # memory that the guest released is being freed
        self._realize(machine)
        machine.take(self.memdev)

    def _realize(self, machine: Machine) -> None:
        if self.memdev in machine.mapped:
            raise QmpError(f"'memdev' property specifies a busy memdev: {self.memdev}")
        nodes = max(1, len(machine.numa))
        if self.node_number >= nodes:
            raise QmpError(f"'node' property has value '{self.node_number}', which exceedsthe number of numa nodes: "
                           f"{nodes}")
        if self.requested % self.block:
            raise QmpError(f"'requested-size' property has to be multiples of 'block-size' ({self.block:#x})")
        if self.bytes % self.block:
            raise QmpError(f"'memdev' property memdev size has to be multiples of'block-size' ({self.block:#x})")

    def set(self, name: str, value: Any) -> None:
        if name == "block-size":
            raise QmpError("'block-size' cannot be changed")
        size = read("size", name, value, text=False)
        if size % self.block:
            raise QmpError(f"'requested-size' has to be multiples of 'block-size' ({self.block:#x})")
        if size > self.bytes:
            raise QmpError(f"'requested-size' cannot exceed the memory backend size({self.bytes:#x})")
        self.requested = size

    def check_removal(self) -> None:
        if self.size:
            raise QmpError("virtio-mem device cannot get unplugged while some of its memory is still plugged")
        if self.requested:
            raise QmpError("virtio-mem device cannot get unplugged while 'requested-size' != '0'")

    def info(self) -> dict[str, Any]:
        return {"memdev": f"/objects/{self.memdev}", "memaddr": self.addr, "requested-size": self.requested,
                "size": self.size, "max-size": self.bytes, "block-size": self.block, "node": self.node_number,
                **self.named()}
