"""The balloon."""

from __future__ import annotations

from typing import Any

from gmemd.emulator.buses import take_pci_address
from gmemd.emulator.devices import Device, Wanted
from gmemd.emulator.machine import Machine
from gmemd.emulator.values import read
from gmemd.errors import QmpError

_PAGE = 4096  # bytes of a balloon's page


class Balloon(Device):
    """A virtio-balloon-pci: it stores how much the guest gave up, and frees nothing on the host."""

    def __init__(self, machine: Machine, wanted: Wanted) -> None:
        super().__init__(wanted)
        self.pci_address = take_pci_address(machine, wanted)
        if any(isinstance(device, Balloon) for device in machine.devices.values()):
            raise QmpError("Only one balloon device is supported")
        self.wanted = self.inflated = 0  # bytes that the guest is asked to give up, and that it has given up
        self.polling = wanted.values.get("guest-stats-polling-interval", 0)  # seconds

    def actual(self, machine: Machine) -> int:
        """Bytes that the guest has, without those of virtio-mem devices."""
        return machine.ram_with_dimms - self.inflated

    def ask(self, machine: Machine, target: int) -> None:
        """Leave `target` bytes to the guest."""
        self.wanted = max(0, machine.ram_with_dimms - target) // _PAGE * _PAGE

    def state(self) -> dict[str, Any]:
        return {"guest-stats-polling-interval": self.polling}

    def set(self, name: str, value: Any) -> None:
        seconds = read("int", name, value, text=False)
        if seconds < 0:
            raise QmpError("timer value must be greater than zero")
        self.polling = seconds
