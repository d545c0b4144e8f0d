"""The QOM types of machines, processors and devices, and their properties for qom-list-properties."""

from __future__ import annotations

from functools import partial
from typing import Any

from gmemd.emulator.machine_types import MACHINES
from gmemd.emulator.tables import DEVICES, EVERY_DEVICE
from gmemd.emulator.topology import CPU_TYPE
from gmemd.objects.qom import Type
from gmemd.schema.validate import Schema

_PARENTS = {
    "accel": "object", "kvm-accel": "accel", "tcg-accel": "accel",
    "machine": "object", "none-machine": "machine", "x86-machine": "machine", "generic-pc-machine": "x86-machine",
    **{f"{kind.name}-machine": "generic-pc-machine" for kind in MACHINES if kind.is_pc},
    "device": "object", "cpu": "device", CPU_TYPE: "cpu",
    **dict.fromkeys(DEVICES, "device"),
    "secret": "object",
}
ABSTRACT = frozenset({"accel", "machine", "x86-machine", "generic-pc-machine", "device", "cpu"})


def device_types(schema: Schema) -> dict[str, Type]:
    return {name: Type(parent, name in ABSTRACT, partial(_properties, schema, name))
            for name, parent in _PARENTS.items()}


def _properties(schema: Schema, type_name: str) -> list[dict[str, Any]]:
    if type_name in schema.object_types:
        return [{"name": member.name, "type": member.qom_type}
                for member in schema.properties(type_name).values() if member.name not in ("qom-type", "id")]
    if type_name.endswith("-machine"):
        return [{"name": "memory-backend", "type": "string"}, {"name": "dump-guest-core", "type": "bool"},
                {"name": "acpi", "type": "OnOffAuto"}]
    return [*EVERY_DEVICE, *DEVICES[type_name].properties] if type_name in DEVICES else []
