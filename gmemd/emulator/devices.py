"""Devices: what all have in common, which is everything for one that only the command line knows.

A device is checked before it is created, in QEMU's order and words (plug.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gmemd.emulator.tables import INNER, Member
from gmemd.errors import QmpError


@dataclass(frozen=True)
class Wanted:
    """The specification of a device; each part has been checked by itself."""

    driver: str
    id: str | None
    name: str  # in the tree: its id, or an assigned one
    values: dict[str, Any]  # the given properties
    hotplugged: bool
    bus: str = ""
    pci_address: int = -1  # 8 * slot + function; -1: any, or it is not on a PCI bus


class Device:
    """A device that merely exists."""

    kind = ""  # of MemoryDeviceInfo
    size = 0  # bytes of it that the guest has
    memdev = ""  # the id of its memory object

    def __init__(self, wanted: Wanted) -> None:
        self.driver, self.id, self.values = wanted.driver, wanted.id, wanted.values
        self.hotplugged, self.bus, self.pci_address = wanted.hotplugged, wanted.bus, wanted.pci_address
        self.leaving = False  # device_del has been answered
        self.path = f"/machine/{'peripheral' if self.id else 'peripheral-anon'}/{wanted.name}"

    def named(self, member: str = "id") -> dict[str, str]:
        """The id as a member of a JSON object; empty if there is none."""
        return {} if self.id is None else {member: self.id}

    def check_removal(self) -> None:
        """Raise QmpError if it cannot be removed."""

    def state(self) -> dict[str, Any]:
        """The values of members that differ from the table or from what was given."""
        return {}

    def set(self, name: str, value: Any) -> None:
        """Change a member that can be changed at any time; QmpError if the value is wrong."""

    def __str__(self) -> str:
        return self.id or "(unnamed)"


def not_writable(driver: str, member: Member) -> QmpError:
    """The error for setting a member that can never be set."""
    owner = INNER[driver] if member.owner == "inner" else driver
    return QmpError(f"Property '{owner}.{member.name}' is not writable")
