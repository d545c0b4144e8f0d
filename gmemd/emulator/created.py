"""-object and -device: what to create, read and checked as far as QEMU does before it creates anything.

With key=value the id must be well-formed, and no two options with the same name may have the same id.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gmemd.emulator.argv import Pairs
from gmemd.emulator.tables import DEVICES
from gmemd.errors import QmpError
from gmemd.schema.help import object_help, object_types_help
from gmemd.schema.keyval import Warn, has_bad_id, parse_object
from gmemd.schema.validate import Schema

_HELP = ("help", "?")
_WIDTH = 22  # of NAME=<TYPE>, where it fits


@dataclass(frozen=True)
class DeviceOption:
    """One -device."""

    properties: dict[str, Any]
    where: str  # the option as written
    text: bool  # its properties were written as key=value


def object_of(value: str, ids: set[tuple[str, str]], warn: Warn, schema: Schema) -> dict[str, Any] | str:
    """The properties of an -object, or the help that it requests; QmpError with the option in front.

    `ids` are option and id of earlier ones that were written as key=value.
    """
    where = f"-object {value}"
    if value.split(",")[0] in _HELP:
        return object_types_help(schema)
    pairs = None if value.startswith("{") else _identified("object", value, ids, warn)
    text = object_help(value, schema)
    if text is not None:
        return text
    if pairs is not None and pairs.all("qom-type")[-1:] == ["monitor-qmp"]:
        return dict(pairs.pairs)
    try:
        properties = parse_object(value, schema)
        if properties.get("qom-type") != "monitor-qmp":
            schema.check_object(properties)
    except QmpError as exc:
        raise QmpError(f"{where}: {exc.desc}") from exc
    return properties


def device_of(value: str, ids: set[tuple[str, str]], warn: Warn) -> DeviceOption | str:
    """What a -device specifies, or the help that it requests; QmpError with the option in front."""
    where = f"-device {value}"
    if value.startswith("{"):
        try:
            properties = parse_object(value)
        except QmpError as exc:
            raise QmpError(f"{where}: {exc.desc}") from exc
    else:
        pairs = _identified("device", value, ids, warn)
        properties = dict(pairs.pairs)
        if pairs.text("driver") in DEVICES and any(key in _HELP for key in properties):
            return _device_help(pairs.text("driver"))
    if not isinstance(properties.get("driver"), str):
        raise QmpError(f"{where}: Parameter 'driver' is missing")
    return DeviceOption(properties, where, not value.startswith("{"))


def _identified(option: str, value: str, ids: set[tuple[str, str]], warn: Warn) -> Pairs:
    pairs = Pairs(option, value, "qom-type" if option == "object" else "driver", warn=warn)
    if has_bad_id(pairs.pairs):
        raise pairs.error("Parameter 'id' expects an identifier")
    first = next((text for key, text in pairs.pairs if key == "id"), None)
    if first is not None:
        if (option, first) in ids:
            raise pairs.error(f"Duplicate ID '{first}' for {option}")
        ids.add((option, first))
    return pairs


def _device_help(driver: str) -> str:
    lines = []
    for row in DEVICES[driver].properties:
        line = f"  {row['name'] + '=<' + row['type'] + '>':<{_WIDTH}}"
        default = row.get("default-value")
        words = row.get("description", "") + ("" if default is None else f" (default: {_word(default)})")
        lines.append(f"{line} - {words}" if words else line.rstrip())
    return "\n".join([f"{driver} options:", *sorted(lines)])


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)
