"""Reading a device's properties: from the JSON of device_add, or from key=value, with QEMU's messages."""

from __future__ import annotations

from typing import Any

from gmemd.errors import QmpError
from gmemd.schema.sizes import parse_size, parse_uint

ON = ("on", "yes", "true", "y")
OFF = ("off", "no", "false", "n")
_BITS = {"int": 64, "int32": 32, "uint64": 64, "uint32": 32, "size": 64}
_INT64 = 1 << 63


def read(kind: str, name: str, value: Any, *, text: bool) -> Any:
    """The value of a property of QOM type `kind`; `text`: it was written as key=value. QmpError if it is invalid."""
    if kind in _BITS:
        return _fit(kind, name, _from_text(kind, name, value) if text else _from_json(kind, name, value))
    if kind == "bool":
        return _boolean(name, value, text=text)
    if type(value) is not str:
        raise QmpError(f"Invalid parameter type for '{name}', expected: string")
    if kind == "OnOffAuto" and value not in ("on", "off", "auto"):
        raise QmpError(f"Parameter '{name}' does not accept value '{value}'")
    return value


def _from_json(kind: str, name: str, value: Any) -> int:
    signed = kind.startswith("int")
    if type(value) is int and -_INT64 <= value < (_INT64 if signed else 2 * _INT64):
        return value
    raise QmpError(f"Invalid parameter type for '{name}', expected: integer" if signed
                   else f"Parameter '{name}' expects uint64")


def _from_text(kind: str, name: str, value: str) -> int:
    if kind == "size":
        size = parse_size(value)
        if size is None:
            raise QmpError(f"Parameter '{name}' expects size")
        return size
    digits = value.lstrip()
    number = parse_uint(digits.removeprefix("-"))
    if number is None:
        raise QmpError(f"Parameter '{name}' expects integer")
    return -number if digits.startswith("-") else number


def _fit(kind: str, name: str, value: int) -> int:
    """A 64-bit number within the type's range: a negative one is read as unsigned."""
    bits = _BITS[kind]
    if kind.startswith("int"):
        least = -1 << (bits - 1)
        if not least <= value < -least:
            raise QmpError(f"Parameter '{name}' expects {kind}_t")
        return value
    value %= 1 << 64
    if value >> bits:
        raise QmpError(f"Parameter '{name}' expects {kind}_t")
    return value


def _boolean(name: str, value: Any, *, text: bool) -> bool:
    if text:
        if value not in ON and value not in OFF:
            raise QmpError(f"Parameter '{name}' expects 'on' or 'off'")
        return value in ON
    if type(value) is not bool:
        raise QmpError(f"Invalid parameter type for '{name}', expected: boolean")
    return value


def pci_address(driver: str, value: Any) -> int:
    """8 * slot + function, from the number itself or from "SLOT" or "SLOT.FUNCTION" in hexadecimal; -1: any."""
    if type(value) is float:
        raise QmpError("Invalid parameter type for 'addr', expected: integer")
    if type(value) is int:
        if not -1 <= value < 256:
            raise QmpError("Parameter 'addr' expects a value between -1 and 255")
        return value
    if type(value) is not str:
        raise QmpError("Invalid parameter type for 'addr', expected int or str")
    slot, dot, function = value.partition(".")
    try:
        parts = int(slot, 16), int(function, 16) if dot else 0
    except ValueError:
        parts = -1, -1
    if not (0 <= parts[0] < 32 and 0 <= parts[1] < 8):
        raise QmpError(f"Property '{driver}.addr' doesn't take value '{value}'")
    return parts[0] * 8 + parts[1]
