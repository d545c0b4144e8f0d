"""The slow path of validate.py: look at what accept.py leaves in doubt, in QEMU's order, and say what is wrong first.

QEMU visits members in schema order, each with everything in it, then the unexpected members, and stops at the first
fault (reference qmp.md section 7). So does this: members that the closures accept need no second look, and of any other
one the keyword of qom.json that its value fails becomes QEMU's sentence. The keywords are read here as `jsonschema`
reads them, which a property test compares; what gmemd's own schema does not have, `jsonschema` decides itself.
"""

from __future__ import annotations

from typing import Any, Final

from gmemd.errors import QmpError
from gmemd.qmp.encode import member_order
from gmemd.qmp.ghashtable import first_unexpected
from gmemd.schema.accept import WRAPPED, Shape, Shapes

_WRAP: Final = 1 << 64
_ELEMENT: Final = "null"  # QEMU's name for an element without a path
_KINDS: Final[dict[str, tuple[type, ...]]] = {  # what a value of a type is; JSON's 1.0 is not an integer
    "array": (list,), "boolean": (bool,), "integer": (int,), "null": (type(None),), "number": (int, float),
    "object": (dict,), "string": (str,)}

Json = dict[str, Any]


class Judge:
    """Decides about arguments, completes the right ones and explains the wrong ones."""

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes
        self._defs = shapes.definitions

    def check(self, key: str, arguments: Json, shape: Shape | None = None) -> Json:
        """The arguments completed according to `key` of $defs; QmpError if they are wrong.

        `shape` is that of the key and, for a union, the tag, if the caller knows it.
        """
        return self._members(shape or self._case(key, arguments), arguments, "")

    def property(self, key: str, name: str, value: Any) -> Any:
        """Check one member of `key` of $defs and return it normalized; raise QmpError."""
        return self._value(self._defs[key]["properties"][name], value, name, name)

    def _case(self, key: str, value: Json) -> Shape:
        """The shape of an object, of a union the branch that the tag selects; if it selects none, any: it will fail."""
        schema = self._defs[key]
        tag = schema.get("x-tag")
        if tag is not None:
            cases: list[str] = self._defs[schema["properties"][tag]["$ref"].rpartition("/")[2]]["enum"]
            case = value.get(tag)
            key = f"{key}:{case if case in cases else cases[0]}"
        return self._shapes.shape(key)

    def _members(self, shape: Shape, given: Json, prefix: str) -> Json:
        """Visit the members of an object whose path is `prefix` (with a trailing dot, or empty)."""
        properties = shape.properties
        completed = {**shape.defaults, **given}
        for name in shape.in_doubt(given):
            if name not in given:
                raise QmpError(f"Parameter '{prefix}{name}' is missing")
            member = properties[name]
            if self._shapes.reject_unstable and "unstable" in member.get("x-features", ()):
                raise QmpError(f"Unstable parameter {name} disabled by policy")
            completed[name] = self._value(member, given[name], prefix + name, name)
        if not given.keys() <= properties.keys() and not self._defs[shape.key]["additionalProperties"]:
            raise QmpError(f"Parameter '{prefix}{_unexpected(given, properties)}' is unexpected")
        return completed

    def _value(self, schema: Json, value: Any, path: str, name: str) -> Any:
        """Visit a value; `name` is QEMU's name for it in those sentences that do not show its path."""
        if "$ref" in schema:
            key = schema["$ref"].rpartition("/")[2]
            schema = self._defs[key]
            if "properties" in schema and isinstance(value, dict):
                return self._members(self._case(key, value), value, f"{path}.")
        keyword = failed(schema, value, self._defs)
        if keyword:
            raise QmpError(_sentence(schema, keyword, value, path, name))
        if "items" in schema:
            items = schema["items"]
            accepts = self._shapes.check(items)
            return [item if accepts(item) else self._value(items, item, f"{path}[{i}]", _ELEMENT)
                    for i, item in enumerate(value)]
        return _normal(schema, value)


def failed(schema: Json, value: Any, definitions: Json) -> str:
    """The first keyword of a value's own schema that the value fails; "" if it fails none.

    What is inside the value does not matter, except for an alternate.
    """
    if "anyOf" in schema:
        return "" if _fits_one(schema, value, definitions) else "anyOf"
    expected = schema.get("type")
    if expected is not None and not _is(value, expected):
        return "type"
    if "enum" in schema and value not in schema["enum"]:
        return "enum"
    if "minimum" in schema and not schema["minimum"] <= value <= schema["maximum"]:
        return "minimum" if value < schema["minimum"] else "maximum"
    return ""


def _is(value: Any, expected: str | list[str]) -> bool:
    """Whether a value is of a type, or one of some types, of JSON Schema."""
    if isinstance(expected, list):
        return any(_is(value, one) for one in expected)
    if type(value) is bool:  # to Python an integer
        return expected == "boolean"
    return isinstance(value, _KINDS[expected])


def _fits_one(schema: Json, value: Any, definitions: Json) -> bool:
    """Whether a value fits a branch of an alternate."""
    import jsonschema

    base: Any = jsonschema.Draft202012Validator
    extend: Any = jsonschema.validators.extend
    strict = extend(base, type_checker=base.TYPE_CHECKER.redefine_many({
        "integer": lambda checker, value: _is(value, "integer"),
        "number": lambda checker, value: _is(value, "number"),
    }))
    fits: bool = strict({"anyOf": schema["anyOf"], "$defs": definitions}).is_valid(value)
    return fits


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
