"""The buses of a machine, as far as devices have to be told where they may go."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gmemd.errors import QmpError

if TYPE_CHECKING:
    from gmemd.emulator.devices import Device
    from gmemd.emulator.machine import Machine

# What the boards themselves have in slot and function of their PCI bus.
_BOARD = {
    "pci.0": {(0, 0): "i440FX", (1, 0): "PIIX3", (1, 1): "piix3-ide", (1, 3): "PIIX4_PM"},
    "pcie.0": {(0, 0): "mch", (31, 0): "ICH9-LPC", (31, 2): "ich9-ahci", (31, 3): "ICH9-SMB"},
}
_PATHS = {"pci.0": "/machine/i440fx/pci.0", "pcie.0": "/machine/q35/pcie.0"}


def bus_kind(machine: Machine, bus: str) -> str | None:
    """System or PCI; None: there is no such bus. Each device of the command line may have a bus of its name."""
    if bus == "main-system-bus":
        return "System"
    names = [machine.kind.pci_bus, *(device.id for device in machine.devices.values() if device.id)]
    return "PCI" if bus and bus in names else None


def bus_path(device: Device) -> str:
    """Where the bus that a device is on stands in the tree; "": it is on none."""
    return _PATHS.get(device.bus, f"/machine/peripheral/{device.bus}/{device.bus}" if device.bus else "")


def take_pci_address(machine: Machine, driver: str, bus: str, wanted: int) -> int:
    """Slot and function (8 * slot + function) for a device: those wanted, or with -1 the first free slot."""
    board = _BOARD.get(bus, {})
    taken = {(device.pci_address >> 3, device.pci_address & 7): device for device in machine.devices.values()
             if device.bus == bus and device.pci_address >= 0}
    if wanted < 0:
        free = next((slot for slot in range(32) if (slot, 0) not in board and (slot, 0) not in taken), None)
        if free is None:
            raise QmpError(f"PCI: no slot/function available for {driver}, all in use or reserved")
        return free * 8
    place = wanted >> 3, wanted & 7
    user = f"{board[place]},id=(null)" if place in board else None
    if place in taken:
        user = f"{taken[place].driver},id={taken[place].id or '(null)'}"
    if user is not None:
        raise QmpError(f"PCI: slot {place[0]} function {place[1]} not available for {driver}, in use by {user}")
    return wanted
