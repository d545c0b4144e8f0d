"""`--object`: QEMU's key=value syntax, or JSON → what Schema.check_object takes.

key=value is read as by QEMU's -object (not as by its QMP): the first item may omit `qom-type=`, a comma in a value is
doubled, the last of several equal keys counts except where they form a list, a key alone means on, and with a leading
`no` off. Members are checked in schema order, left-over keys last.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

from gmemd.errors import QmpError
from gmemd.qmp.ghashtable import first_unexpected
from gmemd.schema.sizes import parse_range, parse_size, parse_uint
from gmemd.schema.validate import Schema

_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9._-]*", re.ASCII)
_STRAY_NUL = re.compile(r"stray ''$")
_ON: Final = ("on", "yes", "true", "y")
_OFF: Final = ("off", "no", "false", "n")

Warn = Callable[[str], None]


def parse_object(spec: str, schema: Schema | None = None, *, warn: Warn | None = None,
                 rooms: bool = False) -> dict[str, Any]:
    """The properties that an --object gives; QmpError in QEMU's words.

    JSON is returned as it is, for Schema.check_object to check; key=value is checked here. `warn` gets a line for each
    key without a value. rooms: its id may be ID@ROOM.
    """
    if spec.startswith("{"):
        return _parse_json(spec)
    if has_bad_id(split(spec), rooms=rooms):
        raise QmpError("Parameter 'id' expects an identifier")
    return _Visit(split(spec, warn), schema or Schema.load()).properties()


def has_bad_id(pairs: list[tuple[str, str]], *, rooms: bool = False) -> bool:
    """Whether the first id, the one that counts, is malformed; QEMU checks that before anything else."""
    first = next((value for key, value in pairs if key == "id"), None)
    return first is not None and not _IDENTIFIER.fullmatch(first.partition("@")[0] if rooms else first)


def split(spec: str, warn: Warn | None = None, *, implied: str = "qom-type") -> list[tuple[str, str]]:
    """The (key, value) pairs of a key=value string in the order of the text.

    `implied` is the key that the first item may omit; "": it may not.
    """
    pairs: list[tuple[str, str]] = []
    rest = spec
    while rest:
        key, rest = _key(rest, "" if pairs else implied)
        if rest.startswith("="):
            value, rest = _value(rest[1:])
        elif not pairs and implied:
            value, rest = _value(rest)
        else:
            flag = key
            key, value = (key[2:], "off") if key.startswith("no") else (key, "on")
            if warn and flag not in ("help", "?"):
                warn(f"short-form boolean option '{flag}' deprecated\nPlease use {key}={value} instead")
        pairs.append((key, value))
        rest = rest[1:]  # the comma
    return pairs


def _key(rest: str, implied: str) -> tuple[str, str]:
    """Take a key off the front; if the first item has none, the implied one, and then nothing is taken."""
    end = re.match(r"[^=,]*", rest)
    assert end
    if implied and not rest.startswith("=", end.end()):
        return implied, rest
    return end.group(), rest[end.end() :]


def _value(rest: str) -> tuple[str, str]:
    """Take a value off the front; it ends before a single comma, and a double comma is one of the value."""
    value = re.match(r"(?:[^,]|,,)*", rest)
    assert value
    return value.group().replace(",,", ","), rest[value.end() :]


def _parse_json(spec: str) -> dict[str, Any]:
    """Read one JSON object as QEMU 11.1 reads a C string: a NUL ends it."""
    from gmemd.qmp.stream import NEED_DATA, Stream

    stream = Stream()
    stream.feed(spec.encode("utf-8", "surrogateescape"))
    value = stream.next()
    if value is NEED_DATA:
        stream.feed(b"\0")
        value = stream.next()
    if isinstance(value, QmpError):
        raise QmpError(_STRAY_NUL.sub("premature end of input", value.desc))
    stream.feed(b"\n{}")
    if stream.next() != {} or stream.next() is not NEED_DATA:
        raise QmpError("Expecting at most one JSON value")
    properties: dict[str, Any] = value
    return properties


def read_word(schema: Schema, qom_type: str, name: str, text: str) -> Any:
    """One property of a type, other than its id, as an --object gives it: "64M", "on", "0-3"; QmpError."""
    return _Visit([(name, text)], schema).read(name, schema.properties(qom_type)[name].type, qom_type)


class _Visit:
    """Reads the pairs member by member in schema order, as QEMU's options visitor does."""

    def __init__(self, pairs: list[tuple[str, str]], schema: Schema) -> None:
        self._schema = schema
        self._given: dict[str, list[str]] = {}
        self._id = next((value for key, value in pairs if key == "id"), None)
        for key, value in pairs:
            if key != "id":
                self._given.setdefault(key, []).append(value)

    def properties(self) -> dict[str, Any]:
        if "qom-type" not in self._given:
            raise QmpError("Parameter 'qom-type' is missing")
        qom_type = self._given["qom-type"][-1]
        if qom_type not in self._schema.object_types:
            raise QmpError(f"Parameter 'qom-type' does not accept value '{qom_type}'")
        if self._id is not None:
            self._given["id"] = [self._id]
        declared = self._schema.properties(qom_type)
        found: dict[str, Any] = {}
        for name, member in declared.items():
            if name in self._given:
                found[name] = self.read(name, member.type, qom_type)
            elif member.required:
                raise QmpError(f"Parameter '{name}' is missing")
        unexpected = first_unexpected(self._given, declared)
        if unexpected is not None:
            raise QmpError(f"Invalid parameter '{unexpected}'")
        return found

    def read(self, name: str, kind: str, qom_type: str) -> Any:
        values = self._given[name]
        if kind.startswith("["):
            return [item for text in values for item in self._elements(name, kind, text, qom_type)]
        text = values[-1]
        if kind == "bool":
            return _boolean(name, text)
        if kind == "size":
            return _number(name, parse_size(text), "a size value")
        if kind.startswith("uint"):
            value = _number(name, parse_uint(text), "a uint64 value")
            return self._schema.check_property(qom_type, name, value)
        return self._schema.check_property(qom_type, name, text)

    def _elements(self, name: str, kind: str, text: str, qom_type: str) -> list[Any]:
        if not kind.startswith("[uint"):
            raise QmpError(f"Parameter '{name}' cannot be given as key=value")
        numbers = parse_range(text)
        if numbers is None:
            raise QmpError(f"Parameter '{name}' expects a uint64 value or range")
        if len(numbers) > 1:  # it does not matter which is reported: only the first that is too large decides
            self._schema.check_property(qom_type, name, [numbers[-1]])
        checked: list[Any] = self._schema.check_property(qom_type, name, [numbers[0]])
        return [*checked, *numbers[1:]]


def _boolean(name: str, text: str) -> bool:
    if text in _ON or text in _OFF:
        return text in _ON
    raise QmpError(f"Parameter '{name}' expects 'on' or 'off'")


def _number(name: str, value: int | None, what: str) -> int:
    if value is None:
        raise QmpError(f"Parameter '{name}' expects {what}")
    return value
