"""The members of QEMU's machines and devices: tables.json, recorded from QEMU by script/record-emulator."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple


class Member(NamedTuple):
    """A member of a machine or device in the QOM tree."""

    name: str
    type: str
    value: Any  # unless another value is known
    owner: str = "own"  # inner: it belongs to the virtio device inside
    when: str = "never"  # it can be set: early (until the device is plugged in), free (at any time), never

    @property
    def is_child(self) -> bool:
        return self.type.startswith("child<")

    @property
    def child_type(self) -> str:
        return self.type.removeprefix("child<").removesuffix(">")


class DeviceTable(NamedTuple):
    """A driver: its properties as in device-list-properties, and the members of its devices in order."""

    properties: list[dict[str, Any]]
    members: Mapping[str, Member]


with open(os.path.join(os.path.dirname(__file__), "tables.json"), encoding="utf-8") as _file:
    # Of members in one bucket of QEMU's hash table the last inserted is written first: so they are inserted backwards.
    _tables = json.load(_file, object_pairs_hook=lambda pairs: dict(reversed(pairs)))

MACHINE_MEMBERS: dict[str, list[Member]] = {
    name: [Member(*row) for row in rows] for name, rows in _tables["machines"].items()}  # alias, alias+nodes, none
DEVICES: dict[str, DeviceTable] = {
    driver: DeviceTable(table["properties"], {
        row[0]: Member(*row[:3], *row[3].split()) for row in table["members"]})
    for driver, table in _tables["devices"].items()}
INNER = {"virtio-mem-pci": "virtio-mem", "virtio-balloon-pci": "virtio-balloon-device"}  # the virtio device inside
EVERY_DEVICE = [{"name": "parent_bus", "type": "link<bus>"}, *(
    {"name": name, "type": "bool"} for name in ("realized", "hotplugged", "hotpluggable"))]
