"""The buses of a machine, as far as they decide where devices may be plugged in."""

from __future__ import annotations

from typing import NamedTuple

from gmemd.emulator.devices import Device, Wanted
from gmemd.emulator.machine import Machine
from gmemd.emulator.values import ON
from gmemd.errors import QmpError

# What the boards themselves have, by slot and function of their PCI bus.
_BOARD = {
    "pci.0": {(0, 0): "i440FX", (1, 0): "PIIX3", (1, 1): "piix3-ide", (1, 3): "PIIX4_PM"},
    "pcie.0": {(0, 0): "mch", (31, 0): "ICH9-LPC", (31, 2): "ich9-ahci", (31, 3): "ICH9-SMB"},
}
_PATHS = {"pci.0": "/machine/i440fx/pci.0", "pcie.0": "/machine/q35/pcie.0"}


def bus_kind(machine: Machine, bus: str) -> str | None:
    """System or PCI; None: unknown bus. Each device of the command line may have a bus with its name."""
    if bus == "main-system-bus":
        return "System"
    names = [machine.kind.pci_bus, *(device.id for device in machine.devices.values() if device.id)]
    return "PCI" if bus and bus in names else None


def bus_path(device: Device) -> str:
    """The path in the tree of the bus that a device is on; "": none."""
    return _PATHS.get(device.bus, f"/machine/peripheral/{device.bus}/{device.bus}" if device.bus else "")


def take_pci_address(machine: Machine, wanted: Wanted) -> int:
    """Slot and function (8 * slot + function) for a device: the requested ones, or the first free slot."""
    users = _users(machine, wanted.bus)
    address = wanted.pci_address
    if address < 0:
        free = next((slot for slot in range(32) if (slot, 0) not in users), None)
        if free is None:
            raise QmpError(f"PCI: no slot/function available for {wanted.driver}, all in use or reserved")
        address = free * 8
    slot, function = address >> 3, address & 7
    user, first = users.get((slot, function)), users.get((slot, 0))
    if user is not None:
        raise QmpError(f"PCI: slot {slot} function {function} not available for {wanted.driver}, in use by "
                       f"{user.driver},id={user.id or '(null)'}")
    if first is not None and wanted.hotplugged:
        raise QmpError(f"PCI: slot {slot} function 0 already occupied by {first.driver}, new func {wanted.driver} "
                       "cannot be exposed to guest.")
    if first is not None and not first.multifunction:
        raise QmpError(f"PCI: single function device can't be populated in function {slot:x}.{function:x}")
    other = next((number for number in range(1, 8) if (slot, number) in users), None)
    if function == 0 and other is not None and not wanted.values.get("multifunction"):
        raise QmpError(f"PCI: {slot:x}.0 indicates single function, but {slot:x}.{other:x} is already populated.")
    return address


class _User(NamedTuple):
    driver: str
    id: str | None = None
    multifunction: bool = True


def _users(machine: Machine, bus: str) -> dict[tuple[int, int], _User]:
    """What is in which slot and function of a bus."""
    users = {place: _User(driver) for place, driver in _BOARD.get(bus, {}).items()}
    for device in machine.devices.values():
        if device.bus == bus and device.pci_address >= 0:
            place = device.pci_address >> 3, device.pci_address & 7
            several = device.values.get("multifunction") in (True, *ON)
            users[place] = _User(device.driver, device.id, several)
    return users
