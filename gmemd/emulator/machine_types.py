"""The machine types, and what -machine may set for each."""

from __future__ import annotations

from dataclasses import dataclass

from gmemd.emulator.commandline import CommandLine
from gmemd.emulator.tables import MACHINE_MEMBERS
from gmemd.emulator.values import read
from gmemd.errors import QmpError


@dataclass(frozen=True)
class MachineType:
    """A machine type of QEMU; `ram_id` is the id of the object that is its memory."""

    name: str
    alias: str = ""
    cpu_max: int = 1
    ram_id: str = "ram"
    is_pc: bool = False  # it has ACPI, and by default processors, slots and memory
    pci_bus: str | None = None
    # RAM below 4 GiB: as much as `low` bytes, or `low_of_more` when there is as much as that or more
    low: int = 0
    low_of_more: int = 0


MACHINES = (
    MachineType("pc-i440fx-11.1", "pc", 255, "pc.ram", True, "pci.0", 0xE0000000, 0xC0000000),
    MachineType("pc-q35-11.1", "q35", 4096, "pc.ram", True, "pcie.0", 0xB0000000, 0x80000000),
    MachineType("none"),
)


def find_type(name: str) -> MachineType:
    """The machine type with that name or alias; any version of a PC is the one that exists."""
    for kind in MACHINES:
        if name in (kind.name, kind.alias) or (kind.is_pc and name.startswith(kind.name.rpartition("-")[0] + "-")):
            return kind
    raise QmpError(f'unsupported machine type: "{name}"\nUse -machine help to list supported machines')


# What -machine takes that is not a property, or not of the machine.
_SUGAR = frozenset({"type", "accel", "kernel-irqchip", "kvm-shadow-mem", "igd-passthru"})


def check_properties(kind: MachineType, line: CommandLine) -> None:
    """Refuse properties of -machine that the machine does not have, and values that they cannot have."""
    members = {member.name: member for member in MACHINE_MEMBERS[kind.alias or "none"]}
    for name, value in line.machine.items():
        member = members.get(name.partition(".")[0])
        if member is None and name not in _SUGAR:
            raise QmpError(f"Property '{kind.name}-machine.{name}' not found")
        if member is not None and member.type in ("bool", "OnOffAuto"):
            read(member.type, name, value, text=True)
