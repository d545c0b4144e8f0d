"""A device in the QOM tree: its members as QEMU lists them, their values, and the answers to setting them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from gmemd.emulator.buses import bus_path
from gmemd.emulator.devices import Device, not_writable
from gmemd.emulator.guest import obeyed
from gmemd.emulator.machine import Machine
from gmemd.emulator.tables import DEVICES, INNER, Member
from gmemd.emulator.values import read
from gmemd.errors import QmpError
from gmemd.objects.qom import Fixed, Node


def device_node(machine: Machine, device: Device) -> Node:
    if device.driver in DEVICES:
        return DeviceNode(machine, device)
    return Fixed(device.path, device.driver, {
        "realized": ("bool", True), "hotplugged": ("bool", device.hotplugged), "hotpluggable": ("bool", True),
        **{name: ("str", str(value)) for name, value in device.values.items() if name != "type"}})


class DeviceNode(Node):
    """A device whose members are known, in the tree."""

    def __init__(self, machine: Machine, device: Device) -> None:
        super().__init__(device.path, device.driver)
        self._machine = machine
        self._device = device
        self._members = DEVICES[device.driver].members

    def child(self, name: str) -> Node | None:
        member = self._members.get(name)
        if member is None or not member.is_child:
            return None
        return Fixed(f"{self.path}/{name}", member.child_type, {})

    def members(self) -> Iterator[tuple[str, str]]:
        for name, member in self._members.items():
            yield name, member.type
            if name == "parent_bus":
                yield "realized", "bool"

    def get(self, name: str) -> Any:
        member = self._members.get(name)
        if name == "realized":
            return True
        if member is None or member.is_child:
            return super().get(name)
        device = self._device
        known = {**device.values, "addr": device.pci_address, **device.state(), "hotplugged": device.hotplugged,
                 "parent_bus": bus_path(device)}
        return known.get(name, member.value)

    def set(self, name: str, value: Any, judged: Callable[[], None]) -> Any:
        device, member = self._device, self._members.get(name)
        if name == "realized":
            if not read("bool", name, value, text=False):
                raise QmpError("a device cannot be removed this way: use device_del")
            judged()
            return {}
        if member is None:
            return super().set(name, value, judged)
        if member.when == "never":
            raise not_writable(device.driver, member)
        if member.type.startswith("link<"):
            read(member.type, name, value, text=False)
        if member.when == "early":
            raise QmpError(self._too_late(member))
        judged()
        device.set(name, value)
        return obeyed(self._machine)

    def _too_late(self, member: Member) -> str:
        device = self._device
        inner = member.owner == "inner"
        kind, device_id = (INNER[device.driver], None) if inner else (device.driver, device.id)
        if member.type.startswith("link<"):
            what, whom = "link property", f"device '{device_id or '(null)'}'"
        else:
            what, whom = "property", f"device '{device_id}'" if device_id else "anonymous device"
        return f"Attempt to set {what} '{member.name}' on {whom} (type '{kind}') after it was realized"
