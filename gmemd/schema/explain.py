"""The slow path of validate.py: `jsonschema` judges, its errors become QEMU's sentence.

QEMU checks members in schema order, each with all that is in it, and unexpected ones after that, and stops at
the first fault (reference qmp.md section 7). `jsonschema` finds all faults in no particular order; the one whose
place comes first in QEMU's order is told. A place is a tuple: at each level the index of the member or element,
or _AFTER_ALL for what is unexpected there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import jsonschema
from jsonschema.exceptions import ValidationError

from gmemd.errors import QmpError
from gmemd.ghashtable import first_unexpected
from gmemd.qmp.encode import member_order

_AFTER_ALL: Final = 1 << 30
_WRAP: Final = 1 << 64
_WRAPPED: Final = ("size", "uint64")
_SIGNED64: Final = ("int", "int64")

# Of several faults in one value, the one QEMU meets first.
_RANKS: Final = {"not": 0, "type": 1, "anyOf": 1, "enum": 2, "minimum": 3, "maximum": 3}

_Place = tuple[int, ...]
_Path = tuple[str | int, ...]


def _is_integer(checker: Any, instance: Any) -> bool:
    return type(instance) is int


def _is_number(checker: Any, instance: Any) -> bool:
    return type(instance) in (int, float)


_TYPES = jsonschema.Draft202012Validator.TYPE_CHECKER.redefine_many(
    {"integer": _is_integer, "number": _is_number}
)
_Validator = jsonschema.validators.extend(jsonschema.Draft202012Validator, type_checker=_TYPES)


class Judge:
    """Decides about arguments and explains what is wrong with them."""

    def __init__(self, document: dict[str, Any], *, reject_unstable: bool = False) -> None:
        self._defs: dict[str, Any] = document["$defs"]
        if reject_unstable:
            self._defs = _refuse_unstable(self._defs)
        self._validators: dict[str, Any] = {}

    def check(self, key: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments completed as `key` of $defs says; raise QmpError."""
        key = self._case(key, arguments)
        self._raise(self._validator(key, f"#/$defs/{key}"), arguments, self._defs[key], ())
        completed: dict[str, Any] = self._complete(self._defs[key], arguments)
        return completed

    def property(self, key: str, name: str, value: Any) -> Any:
        """Check one member of `key` of $defs and return it normalized; raise QmpError."""
        schema = self._defs[key]["properties"][name]
        validator = self._validators.get(f"{key}.{name}")
        if validator is None:
            validator = _Validator(schema | {"$defs": self._defs})
            self._validators[f"{key}.{name}"] = validator
        self._raise(validator, value, schema, (name,))
        return self._complete(schema, value)

    def _validator(self, key: str, reference: str) -> Any:
        validator = self._validators.get(key)
        if validator is None:
            validator = _Validator({"$ref": reference, "$defs": self._defs})
            self._validators[key] = validator
        return validator

    def _case(self, key: str, value: Any) -> str:
        """Return the branch of a union that the value's tag chooses, or the key itself."""
        tag = self._defs[key].get("x-tag")
        if tag is None or not isinstance(value, dict):
            return key
        case = value.get(tag)
        chosen = f"{key}:{case}"
        return chosen if isinstance(case, str) and chosen in self._defs else key

    def _resolve(self, schema: dict[str, Any], value: Any) -> dict[str, Any]:
        """Follow a $ref, and from a union go on to the branch that applies."""
        if "$ref" not in schema:
            return schema
        key = self._case(schema["$ref"].rpartition("/")[2], value)
        found: dict[str, Any] = self._defs[key]
        return found

    # -- refusing

    def _raise(self, validator: Any, instance: Any, schema: dict[str, Any], path: _Path) -> None:
        """Raise the fault that QEMU would meet first, if there is one."""
        faults = [self._fault(error, instance, schema, path) for error in validator.iter_errors(instance)]
        if faults:
            _, _, say = min(faults, key=lambda fault: fault[:2])
            raise QmpError(say())

    def _fault(
        self, error: ValidationError, instance: Any, schema: dict[str, Any], path: _Path
    ) -> tuple[_Place, int, Callable[[], str]]:
        """Return place, rank and sentence of one error."""
        steps = tuple(error.absolute_path)
        place = self._place(steps, instance, schema)
        full = (*path, *steps)
        if error.validator == "required":
            required: Sequence[str] = error.validator_value
            name = next(name for name in required if name not in error.instance)
            members = list(self._resolve_at(steps, instance, schema)["properties"])
            return (
                (*place, members.index(name)),
                0,
                lambda: f"Parameter '{_dotted((*full, name))}' is missing",
            )
        if error.validator == "additionalProperties":
            return (*place, _AFTER_ALL), 0, lambda: self._unexpected(error, full)
        rank = _RANKS[error.validator]
        return place, rank, lambda: _sentence(error, full)

    @staticmethod
    def _unexpected(error: ValidationError, full: _Path) -> str:
        declared = error.schema["properties"]
        name = first_unexpected(member_order(error.instance), declared)
        return f"Parameter '{_dotted((*full, name or ''))}' is unexpected"

    def _place(self, steps: _Path, instance: Any, schema: dict[str, Any]) -> _Place:
        place = []
        for step in steps:
            schema = self._resolve(schema, instance)
            if isinstance(step, int):
                place.append(step)
                schema = schema["items"]
            else:
                place.append(list(schema["properties"]).index(step))
                schema = schema["properties"][step]
            instance = instance[step]
        return tuple(place)

    def _resolve_at(self, steps: _Path, instance: Any, schema: dict[str, Any]) -> dict[str, Any]:
        for step in steps:
            schema = self._resolve(schema, instance)
            schema = schema["items"] if isinstance(step, int) else schema["properties"][step]
            instance = instance[step]
        return self._resolve(schema, instance)

    # -- completing

    def _complete(self, schema: dict[str, Any], value: Any) -> Any:
        """Fill in defaults, wrap what is unsigned and negative, turn true and false into on and off."""
        schema = self._resolve(schema, value)
        if isinstance(value, dict) and "properties" in schema:
            properties = schema["properties"]
            done = {name: member["default"] for name, member in properties.items() if "default" in member}
            done.update((name, self._complete(properties[name], item)) for name, item in value.items())
            return done
        if isinstance(value, list) and "items" in schema:
            return [self._complete(schema["items"], item) for item in value]
        if type(value) is int and value < 0 and schema.get("x-qapi") in _WRAPPED:
            return value % _WRAP
        if type(value) is bool and schema.get("x-accepts-bool"):
            return "on" if value else "off"
        return value


def _sentence(error: ValidationError, full: _Path) -> str:
    """QEMU's sentence for a value that is wrong in itself."""
    schema = error.schema
    name = _dotted(full)
    if error.validator == "not":
        return f"Unstable parameter {full[-1]} disabled by policy"
    innermost = full[-1] if isinstance(full[-1], str) else "null"
    if error.validator == "enum":
        return f"Parameter '{innermost}' does not accept value '{error.instance}'"
    qapi = schema.get("x-qapi", "")
    expected = schema.get("type")
    if expected == "integer":
        return _integer_sentence(qapi, error.instance, name, innermost)
    if isinstance(expected, list):
        expected = "string"
    return f"Invalid parameter type for '{name}', expected: {expected or qapi}"


def _integer_sentence(qapi: str, value: Any, name: str, innermost: str) -> str:
    integer = type(value) is int
    if qapi.startswith(("uint", "size")):
        if qapi in _WRAPPED or not integer or not -(1 << 63) <= value < 1 << 64:
            return f"Parameter '{name}' expects uint64"
    elif qapi in _SIGNED64 or not integer or not -(1 << 63) <= value < 1 << 63:
        return f"Invalid parameter type for '{name}', expected: integer"
    return f"Parameter '{innermost}' expects {qapi}_t"


def _dotted(path: _Path) -> str:
    """Write a path as QEMU does: members parted by dots, elements in brackets."""
    parts = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return "".join(parts).removeprefix(".")


def _refuse_unstable(defs: dict[str, Any]) -> dict[str, Any]:
    """Return $defs in which no value is right for a member that is unstable."""
    return {key: dict(_with_refusals(schema)) for key, schema in defs.items()}


def _with_refusals(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for keyword, value in schema.items():
        if keyword == "properties":
            yield (
                keyword,
                {
                    name: member | {"not": {}} if "unstable" in member.get("x-features", ()) else member
                    for name, member in value.items()
                },
            )
        else:
            yield keyword, value
