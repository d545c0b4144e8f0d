"""The fast path of validate.py: what certainly is right, and needs no completion, by closures made from qom.json.

A closure says of one value whether JSON Schema and QEMU accept it and it is stored as it is. False means only that
explain.py must decide: the value is wrong, or is stored differently (a negative size, a boolean for on and off).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

_PLAIN: Final[dict[Any, type]] = {"string": str, "boolean": bool}  # every value of these types is right
WRAPPED: Final = ("size", "uint64")  # a negative one is stored modulo 2^64

Check = Callable[[Any], bool]
Json = dict[str, Any]


class Shape:
    """One closed object type: its members, what is mandatory, the defaults, and which objects it accepts."""

    __slots__ = ("_checks", "_integers", "_plain", "_required", "_tag", "defaults", "key", "properties", "required")

    def __init__(self, key: str, shapes: Shapes) -> None:
        schema = shapes.definitions[key]
        self.key = key
        self.properties: Json = schema["properties"]
        self.required: tuple[str, ...] = tuple(schema.get("required", ()))
        self._required = frozenset(self.required)
        self.defaults = {name: member["default"] for name, member in self.properties.items() if "default" in member}
        self._plain: dict[str, type] = {}
        self._integers: dict[str, tuple[int, int]] = {}  # the least and the most
        self._checks: dict[str, Check] = {}
        for name, member in self.properties.items():
            if shapes.reject_unstable and "unstable" in member.get("x-features", ()):
                continue
            if "enum" not in member and member.get("type") in _PLAIN:
                self._plain[name] = _PLAIN[member["type"]]
            elif "enum" not in member and member.get("type") == "integer":
                self._integers[name] = _bounds(member)
            else:
                self._checks[name] = shapes.check(member)
        union, _, case = key.partition(":")
        self._tag: str | None = shapes.definitions[union].get("x-tag") if case else None
        if self._tag is not None:  # the shape was chosen by its word
            self._plain[self._tag] = str

    def accepts(self, given: Json) -> bool:
        """Whether `given` is certainly right; absent members with a default are left to the caller."""
        plain, integers = self._plain, self._integers
        for name, value in given.items():
            kind = type(value)
            if kind is not plain.get(name):
                if kind is int and name in integers:
                    least, most = integers[name]
                    if least <= value <= most:
                        continue
                    return False
                check = self._checks.get(name)
                if check is None or not check(value):
                    return False
        return given.keys() >= self._required

    def in_doubt(self, given: Json) -> list[str]:
        """The declared members that are missing or not certainly right, in the order of the schema."""
        properties = self.properties
        names = [name for name in self.required if name not in given]
        for name, value in given.items():
            if name in properties and (name == self._tag or not self.accepts_member(name, value)):
                names.append(name)
        if len(names) > 1:
            names.sort(key=list(properties).index)
        return names

    def accepts_member(self, name: str, value: Any) -> bool:
        """Whether a value is certainly right for one member, and there is one with that name."""
        if type(value) is self._plain.get(name):
            return True
        if type(value) is int and name in self._integers:
            least, most = self._integers[name]
            return least <= value <= most
        return name in self._checks and self._checks[name](value)

    def accepts_whole(self, given: Any) -> bool:
        """The same for a value within another, where nobody fills in defaults."""
        if type(given) is not dict or not self.accepts(given):
            return False
        return not self.defaults or self.defaults.keys() <= given.keys()


class Shapes:
    """The closures of a document, each made when it is first needed."""

    def __init__(self, document: Json, *, reject_unstable: bool) -> None:
        self.definitions: dict[str, Json] = document["$defs"]
        self.reject_unstable = reject_unstable
        self._shapes: dict[str, Shape] = {}
        self._checks: dict[str, Check] = {}

    def shape(self, key: str) -> Shape:
        """The closed object type `key` of $defs."""
        shape = self._shapes.get(key)
        if shape is None:
            shape = self._shapes[key] = Shape(key, self)
        return shape

    def check(self, schema: Json) -> Check:
        """The closure for values of a schema of the document."""
        if "$ref" in schema:
            return self._definition(schema["$ref"].rpartition("/")[2])
        if "enum" in schema:
            return _word(frozenset(word for word in schema["enum"] if type(word) is str))
        kind = schema.get("type")
        if kind == "integer":
            return _integer(*_bounds(schema))
        if kind == "array":
            return _list(self.check(schema["items"]))
        if kind in _PLAIN:
            return _exactly(_PLAIN[kind])
        return _anything if schema.get("x-qapi") == "any" else _nothing

    def _definition(self, key: str) -> Check:
        """The closure for a type with a name; those in it are made at its first use, because it may contain itself."""
        check = self._checks.get(key)
        if check is None:
            schema = self.definitions[key]
            check = self._checks[key] = self._object(key, schema) if "properties" in schema else self.check(schema)
        return check

    def _object(self, key: str, schema: Json) -> Check:
        tag: str | None = schema.get("x-tag")

        def accepts(value: Any) -> bool:
            if tag is None:
                return self.shape(key).accepts_whole(value)
            case = value.get(tag) if type(value) is dict else None
            branch = f"{key}:{case}" if type(case) is str else ""
            return branch in self.definitions and self.shape(branch).accepts_whole(value)

        return accepts


def _bounds(schema: Json) -> tuple[int, int]:
    """The least and the most integer that is stored as it is."""
    return 0 if schema["x-qapi"] in WRAPPED else schema["minimum"], schema["maximum"]


def _anything(value: Any) -> bool:
    return True


def _nothing(value: Any) -> bool:
    return False


def _exactly(kind: type) -> Check:
    return lambda value: type(value) is kind


def _word(words: frozenset[str]) -> Check:
    return lambda value: type(value) is str and value in words


def _integer(least: int, most: int) -> Check:
    return lambda value: type(value) is int and least <= value <= most


def _list(accepts: Check) -> Check:
    return lambda value: type(value) is list and all(map(accepts, value))
