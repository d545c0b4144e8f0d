"""The slow path of validate.py: walk the arguments in QEMU's order and say what is wrong first.

QEMU visits members in schema order, each with everything in it, then the unexpected members, and stops at the first
fault (reference qmp.md section 7). So does this walk; `jsonschema` checks each value against its own part of qom.json,
and the keyword that fails becomes QEMU's sentence. The closures of accept.py run before it, and may only accept.
"""

from __future__ import annotations

import json
from typing import Any, Final

import jsonschema

from gmemd.errors import QmpError
from gmemd.qmp.encode import member_order
from gmemd.qmp.ghashtable import first_unexpected
from gmemd.schema.accept import WRAPPED, Check, Shapes

_WRAP: Final = 1 << 64
_KEYWORDS: Final = ("type", "enum", "minimum", "maximum", "anyOf")  # of a value, in the order of checking
_ELEMENT: Final = "null"  # QEMU's name for an element without a path

Json = dict[str, Any]


_extend: Final[Any] = jsonschema.validators.extend
_BASE: Final[Any] = jsonschema.Draft202012Validator
_Validator: Final = _extend(_BASE, type_checker=_BASE.TYPE_CHECKER.redefine_many({
    "integer": lambda checker, value: type(value) is int,  # in JSON Schema 1.0 is one too
    "number": lambda checker, value: type(value) in (int, float),
}))


class Judge:
    """Decides about arguments, completes the right ones and explains the wrong ones."""

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes
        self._defs = shapes.definitions
        self._reject_unstable = shapes.reject_unstable
        # What accepts and what explains, by the identity of their schema, which is part of the document; and what
        # explains by the part of it that it checks, which is the same for many.
        self._judges: dict[int, tuple[Check, Any]] = {}
        self._made: dict[str, Any] = {}

    def prepare(self) -> None:
        """Build the validators of all values and use each once, so that no first use has to load anything."""
        for definition in list(self._defs.values()):
            for schema in (definition, *definition.get("properties", {}).values()):
                while schema is not None:
                    if "properties" not in schema and "$ref" not in schema:
                        _, judge = self._judges_for(schema)
                        next(judge.iter_errors(self), None)
                    schema = schema.get("items")

    def check(self, key: str, arguments: Json) -> Json:
        """The arguments completed according to `key` of $defs; QmpError if they are wrong."""
        return self._members(self._case(self._defs[key], key, arguments), arguments, "")

    def property(self, key: str, name: str, value: Any) -> Any:
        """Check one member of `key` of $defs and return it normalized; raise QmpError."""
        return self._value(self._defs[key]["properties"][name], value, name, name)

    def _case(self, schema: Json, key: str, value: Json) -> Json:
        """The branch of a union that the tag selects; if it selects none, any: its tag will fail."""
        tag = schema.get("x-tag")
        if tag is None:
            return schema
        cases: list[str] = self._defs[schema["properties"][tag]["$ref"].rpartition("/")[2]]["enum"]
        case = value.get(tag)
        return self._defs[f"{key}:{case if case in cases else cases[0]}"]

    def _members(self, schema: Json, given: Json, prefix: str) -> Json:
        """Visit the members of an object whose path is `prefix` (with a trailing dot, or empty)."""
        properties: dict[str, Json] = schema["properties"]
        required = schema.get("required", ())
        completed = {}
        visited = 0
        for name, member in properties.items():
            if name in given:
                visited += 1
                if self._reject_unstable and "unstable" in member.get("x-features", ()):
                    raise QmpError(f"Unstable parameter {name} disabled by policy")
                completed[name] = self._value(member, given[name], prefix + name, name)
            elif name in required:
                raise QmpError(f"Parameter '{prefix}{name}' is missing")
            elif "default" in member:
                completed[name] = member["default"]
        if visited < len(given):
            if schema["additionalProperties"]:
                return given | completed
            raise QmpError(f"Parameter '{prefix}{_unexpected(given, properties)}' is unexpected")
        return completed

    def _value(self, schema: Json, value: Any, path: str, name: str) -> Any:
        """Visit a value; `name` is QEMU's name for it in those sentences that do not show its path."""
        if "$ref" in schema:
            key = schema["$ref"].rpartition("/")[2]
            schema = self._defs[key]
            if "properties" in schema and isinstance(value, dict):
                return self._members(self._case(schema, key, value), value, f"{path}.")
        accepts, judge = self._judges_for(schema)
        if accepts(value):
            return value
        error = next(judge.iter_errors(value), None)
        if error is not None:
            raise QmpError(_sentence(schema, error.validator, value, path, name))
        if "items" in schema:
            items = schema["items"]
            return [self._value(items, item, f"{path}[{i}]", _ELEMENT) for i, item in enumerate(value)]
        return _normal(schema, value)

    def _judges_for(self, schema: Json) -> tuple[Check, Any]:
        judges = self._judges.get(id(schema))
        if judges is None:
            judges = self._judges[id(schema)] = self._shapes.check(schema), self._validator(schema)
        return judges

    def _validator(self, schema: Json) -> Any:
        judged: Json = {keyword: schema[keyword] for keyword in _KEYWORDS if keyword in schema}
        text = json.dumps(judged)
        validator = self._made.get(text)
        if validator is None:
            if "anyOf" in judged:
                judged["$defs"] = self._defs
            validator = self._made[text] = _Validator(judged)
        return validator


def _unexpected(given: Json, declared: Json) -> str | None:
    """Which of the undeclared members QEMU would name."""
    left = [name for name in given if name not in declared]
    return left[0] if len(left) == 1 else first_unexpected(member_order(given), declared)


def _normal(schema: Json, value: Any) -> Any:
    """A valid value as it is stored: negative unsigned wrapped, true and false as on and off."""
    if type(value) is int and value < 0 and schema.get("x-qapi") in WRAPPED:
        return value % _WRAP
    if type(value) is bool and "x-accepts-bool" in schema:
        return "on" if value else "off"
    return value


def _sentence(schema: Json, keyword: str, value: Any, path: str, name: str) -> str:
    """QEMU's sentence for a value that fails this keyword of its schema."""
    if keyword == "enum":
        return f"Parameter '{name}' does not accept value '{value}'"
    expected = schema.get("type")
    if expected == "integer":
        return _integer_sentence(schema["x-qapi"], value, path, name)
    if isinstance(expected, list):
        expected = "string"
    return f"Invalid parameter type for '{path}', expected: {expected or schema['x-qapi']}"


def _integer_sentence(kind: str, value: Any, path: str, name: str) -> str:
    """An integer is first read as 64 bits, then checked against the range of a smaller type."""
    signed = kind.startswith("int")
    fits = type(value) is int and -(1 << 63) <= value < 1 << (63 if signed else 64)
    if fits:
        return f"Parameter '{name}' expects {kind}_t"
    if signed:
        return f"Invalid parameter type for '{path}', expected: integer"
    return f"Parameter '{path}' expects uint64"
