"""Devices: dimms and virtio-mem, which are memory, a balloon, and whatever else a command line names.

A device is made by `make_device`, checked in QEMU's order and words; it has taken its memory object then.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from gmemd.commands.qom import Fixed
from gmemd.errors import DEVICE_NOT_FOUND, QmpError
from gmemd.schema.sizes import parse_size

if TYPE_CHECKING:
    from gmemd.emulator.machine import Machine

ALIGNMENT = 2 << 20  # bytes: dimms and virtio-mem begin at huge pages
BLOCK = 2 << 20  # bytes: virtio-mem's block, unless told otherwise

_BALLOON_STATS = tuple(f"stat-{name}" for name in (
    "swap-in", "swap-out", "major-faults", "minor-faults", "free-memory", "total-memory", "available-memory",
    "disk-caches", "htlb-pgalloc", "htlb-pgfail"))
_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9\-._]*")

DEVICE_TYPES: dict[str, dict[str, str]] = {
    "pc-dimm": {"memdev": "link<memory-backend>", "node": "uint32", "addr": "uint64", "slot": "int32",
                "size": "uint64"},
    "virtio-mem-pci": {"memdev": "link<memory-backend>", "node": "uint32", "memaddr": "uint64", "block-size": "size",
                       "requested-size": "size", "size": "size", "prealloc": "bool",
                       "unplugged-inaccessible": "OnOffAuto", "dynamic-memslots": "bool"},
    "virtio-balloon-pci": {"deflate-on-oom": "bool", "free-page-reporting": "bool", "free-page-hint": "bool",
                           "guest-stats-polling-interval": "int"},
}


def device_properties(driver: str) -> list[dict[str, Any]]:
    """Name and type of each property of a device type; none for what is no device type."""
    return [{"name": name, "type": kind} for name, kind in DEVICE_TYPES.get(driver, {}).items()]


class Device:
    """A device that is only there."""

    kind = ""  # of MemoryDeviceInfo
    size = 0  # bytes that the guest has of it
    memdev = ""

    def __init__(self, machine: Machine, arguments: dict[str, Any], *, hotplugged: bool) -> None:
        self.driver: str = arguments["driver"]
        self.id: str | None = arguments.get("id")
        self.hotplugged = hotplugged
        self.arguments = arguments
        self.leaving = False  # device_del has been answered
        container = "peripheral" if self.id else "peripheral-anon"
        name = self.id or f"device[{sum(1 for path in machine.devices if '/peripheral-anon/' in path)}]"
        self.path = f"/machine/{container}/{name}"

    def check_removal(self) -> None:
        """Raise QmpError if it cannot be removed."""

    def properties(self) -> dict[str, tuple[str, Any]]:
        """What qom-list shows, with values."""
        return {name: ("str", str(value)) for name, value in self.arguments.items() if name not in ("driver", "id")}

    def shown(self) -> dict[str, tuple[str, Any]]:
        """The properties of every device and its own."""
        return {"realized": ("bool", True), "hotplugged": ("bool", self.hotplugged), "hotpluggable": ("bool", True),
                **self.properties()}

    def node(self, machine: Machine) -> Fixed:
        """Its place in the QOM tree."""
        return Fixed(machine.gmemd, self.path, self.driver, self.shown())


class MemoryDevice(Device):
    """What pc-dimm and virtio-mem share: an object, a NUMA node, a range of guest addresses."""

    address = "addr"  # the property that gives it
    no_memdev = "'memdev' property must be set"

    def __init__(self, machine: Machine, arguments: dict[str, Any], *, hotplugged: bool) -> None:
        super().__init__(machine, arguments, hotplugged=hotplugged)
        if "memdev" not in arguments:
            raise QmpError(self.no_memdev)
        self.memdev = str(arguments["memdev"]).removeprefix("/objects/")
        backend = machine.gmemd.objects.get(self.memdev)
        if backend is None:
            raise QmpError(f"Device '{arguments['memdev']}' not found", DEVICE_NOT_FOUND)
        self.node_number = integer(arguments, "node", 0)
        self.bytes = backend.size  # of the object
        self.check(machine)
        self.place(machine)
        machine.take(self.memdev)

    def check(self, machine: Machine) -> None:
        """Raise QmpError for what the device's own rules forbid."""
        raise NotImplementedError

    def place(self, machine: Machine) -> None:
        """Find guest addresses for it: those asked for, or the first that are free."""
        if self.memdev in machine.mapped:
            raise QmpError(f"can't use already busy memdev: {self.memdev}")
        start, total = machine.device_memory
        if not total:
            raise QmpError("memory devices (e.g. for memory hotplug) are not enabled, please specify the maxmem option")
        others = sorted((d for d in machine.devices.values() if isinstance(d, MemoryDevice)), key=lambda d: d.addr)
        used = sum(other.bytes for other in others)
        if used + self.bytes > total:
            raise QmpError(f"not enough space, currently {used:#x} in use of total space for memory devices {total:#x}")
        wanted = integer(self.arguments, self.address, 0)
        self.addr = wanted or start
        for other in others:
            if self.addr < other.addr + other.bytes and other.addr < self.addr + self.bytes:
                if wanted:
                    raise QmpError(f"address range conflicts with memory device id='{other.id or '(unnamed)'}'")
                self.addr = -(-(other.addr + other.bytes) // ALIGNMENT) * ALIGNMENT

    def info(self) -> dict[str, Any]:
        """What query-memory-devices tells."""
        raise NotImplementedError

    def properties(self) -> dict[str, tuple[str, Any]]:
        kinds, info = DEVICE_TYPES[self.driver], self.info()
        return {name: (kinds[name], value) for name, value in info.items() if name in kinds}


class Dimm(MemoryDevice):
    """A pc-dimm."""

    kind = "dimm"
    slot = -1

    def check(self, machine: Machine) -> None:
        unknown = next((n for n in self.arguments if n not in ("driver", "id", "bus", *DEVICE_TYPES["pc-dimm"])), None)
        if unknown is not None:
            raise QmpError(f"Property 'pc-dimm.{unknown}' not found")
        if not machine.acpi:
            raise QmpError("memory hotplug is not enabled: missing acpi device or acpi disabled")
        slots, nodes = machine.line.ram.slots, max(1, len(machine.line.numa))
        if not slots:
            raise QmpError("no slots where allocated, please specify the 'slots' option")
        if self.node_number >= nodes:
            raise QmpError(f"'DIMM property node has value {self.node_number}' which exceeds the number of numa nodes: "
                           f"{nodes}")
        taken = {device.slot for device in machine.devices.values() if isinstance(device, Dimm)}
        slot = integer(self.arguments, "slot", -1)
        if slot >= slots or slot < -1:
            raise QmpError(f"invalid slot number {slot}, valid range is [0-{slots - 1}]")
        if slot in taken:
            raise QmpError(f"slot {slot} is busy")
        free = [number for number in range(slots) if number not in taken]
        if not free:
            raise QmpError("no free slots available")
        self.slot = free[0] if slot == -1 else slot
        self.size = self.bytes

    def info(self) -> dict[str, Any]:
        name = {} if self.id is None else {"id": self.id}
        return {"memdev": f"/objects/{self.memdev}", "addr": self.addr, "size": self.bytes, "slot": self.slot,
                "node": self.node_number, "hotplugged": self.hotplugged, "hotpluggable": True, **name}


class VirtioMem(MemoryDevice):
    """A virtio-mem-pci; the guest takes at once what is asked for, while it runs."""

    kind = "virtio-mem"
    address = "memaddr"
    no_memdev = "'memdev' property is not set"

    def check(self, machine: Machine) -> None:
        nodes = max(1, len(machine.line.numa))
        if self.node_number >= nodes:
            raise QmpError(f"'node' property has value '{self.node_number}', which exceeds the number of numa nodes: "
                           f"{nodes}")
        self.block = integer(self.arguments, "block-size", BLOCK)
        if self.block < 1 << 20 or self.block & (self.block - 1):
            raise QmpError("'block-size' property has to be a power of two of at least 0x100000")
        self.requested = 0
        self.request(integer(self.arguments, "requested-size", 0))

    def request(self, size: int) -> None:
        """Ask the guest to use so many bytes."""
        if size > self.bytes:
            raise QmpError(f"'requested-size' cannot exceed the memory backend size({self.bytes:#x})")
        if size % self.block:
            raise QmpError(f"'requested-size' has to be multiples of 'block-size' ({self.block:#x})")
        self.requested = size

    def check_removal(self) -> None:
        if self.size:
            raise QmpError("virtio-mem device cannot get unplugged while some of its memory is still plugged")
        if self.requested:
            raise QmpError("virtio-mem device cannot get unplugged while 'requested-size' != '0'")

    def info(self) -> dict[str, Any]:
        name = {} if self.id is None else {"id": self.id}
        return {"memdev": f"/objects/{self.memdev}", "memaddr": self.addr, "requested-size": self.requested,
                "size": self.size, "max-size": self.bytes, "block-size": self.block, "node": self.node_number, **name}

    def node(self, machine: Machine) -> Fixed:
        return _VirtioMemNode(machine, self)


class _VirtioMemNode(Fixed):
    """A virtio-mem device in the tree: its requested-size can be set."""

    def __init__(self, machine: Machine, device: VirtioMem) -> None:
        super().__init__(machine.gmemd, device.path, device.driver, device.shown())
        self._machine = machine
        self._device = device

    def set(self, name: str, value: Any) -> Any:
        if name != "requested-size":
            return super().set(name, value)
        if type(value) is not int or value < 0:
            raise QmpError("Parameter 'requested-size' expects uint64")
        self._device.request(value)
        follow_requests(self._machine)
        return {}


class Balloon(Device):
    """A virtio-balloon-pci: it keeps the number that it is told."""

    def __init__(self, machine: Machine, arguments: dict[str, Any], *, hotplugged: bool) -> None:
        super().__init__(machine, arguments, hotplugged=hotplugged)
        if any(isinstance(device, Balloon) for device in machine.devices.values()):
            raise QmpError("Only one balloon device is supported")
        self.actual = machine.base_memory

    def properties(self) -> dict[str, tuple[str, Any]]:
        """No guest tells its figures: all are unknown."""
        stats = dict.fromkeys(_BALLOON_STATS, (1 << 64) - 1)
        return {"guest-stats": ("guest statistics", {"stats": stats, "last-update": 0}),
                "guest-stats-polling-interval": ("int", 0)}


_CLASSES: dict[str, type[Device]] = {"pc-dimm": Dimm, "virtio-mem-pci": VirtioMem, "virtio-balloon-pci": Balloon}


def make_device(machine: Machine, arguments: dict[str, Any], *, hotplugged: bool) -> Device:
    """Make a device and plug it in; a driver that is not known is taken only from the command line."""
    driver = arguments["driver"]
    if driver in machine.abstract:
        raise QmpError("Parameter 'driver' expects a non-abstract device type")
    if driver == "nvdimm":
        raise QmpError("nvdimm is not enabled: missing 'nvdimm' in '-M'")
    if driver not in _CLASSES and hotplugged:
        raise QmpError(f"'{driver}' is not a valid device model name")
    device_id = arguments.get("id")
    if device_id is not None and not (isinstance(device_id, str) and _IDENTIFIER.fullmatch(device_id)):
        raise QmpError("Parameter 'id' expects an identifier")
    if device_id is not None and f"/machine/peripheral/{device_id}" in machine.devices:
        raise QmpError(f"Duplicate device ID '{device_id}'")
    device = _CLASSES.get(driver, Device)(machine, arguments, hotplugged=hotplugged)
    machine.devices[device.path] = device
    return device


def follow_requests(machine: Machine) -> None:
    """Let the guest, if it runs, use as much of each virtio-mem device as it is asked to; what it lets go is freed."""
    if machine.status != "running":
        return
    for device in machine.devices.values():
        if isinstance(device, VirtioMem) and device.size != device.requested:
            if device.requested < device.size:
                backend = machine.gmemd.objects.find(device.memdev)
                machine.gmemd.kernel.punch_hole(backend.fd, backend.offset + device.requested,
                                                device.size - device.requested)
            device.size = device.requested
            name = {} if device.id is None else {"id": device.id}
            machine.gmemd.emit("MEMORY_DEVICE_SIZE_CHANGE", {**name, "size": device.size, "qom-path": device.path})


def integer(arguments: dict[str, Any], name: str, default: int) -> int:
    """A number, as JSON or as the command line writes it."""
    value = arguments.get(name, default)
    if isinstance(value, str):
        value = parse_size(value)
    if type(value) is not int:
        raise QmpError(f"Parameter '{name}' expects uint64")
    return value
