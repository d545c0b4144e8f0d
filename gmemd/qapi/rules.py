"""The form of QAPI expressions: which keys, which kinds of values, which names.

The rules for a single definition (docs/devel/qapi-code-gen of QEMU, "Schema syntax" and "Naming rules and
reserved names"); checks.py has the rules between definitions.
Short forms are expanded in place: afterwards every member, branch, value and feature is an object.
"""

from __future__ import annotations

import re
from typing import Any

from gmemd.qapi.text import Expression
from gmemd.qapi.tokens import Pragma, QapiError, Where

KINDS = ("enum", "struct", "union", "alternate", "command", "event")

_MANDATORY: dict[str, tuple[str, ...]] = {
    "enum": ("data",),
    "struct": ("data",),
    "union": ("base", "discriminator", "data"),
    "alternate": ("data",),
    "command": (),
    "event": (),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "enum": ("if", "features", "prefix"),
    "struct": ("base", "if", "features"),
    "union": ("if", "features"),
    "alternate": ("if", "features"),
    "command": (
        *("data", "returns", "boxed", "if", "features", "gen", "success-response"),
        *("allow-oob", "allow-preconfig", "coroutine"),
    ),
    "event": ("data", "boxed", "if", "features"),
}
_FLAGS = {  # name: the one value it may have
    **dict.fromkeys(("gen", "success-response"), False),
    **dict.fromkeys(("boxed", "allow-oob", "allow-preconfig", "coroutine", "reads-only"), True),
}
_ROLES = ("observer", "member", "tenant", "operator", "admin")  # of authority.policy, the least that may use a command
_EXTENSION_KEYS = ("default", "accepts-bool", "qom")

_NAME = re.compile(r"(?:__[a-z0-9.-]+_)?(?:x-)?([a-z][a-z0-9_-]*)", re.IGNORECASE)
_CONDITION = re.compile(r"[A-Z][A-Z0-9_]*")


def c_name(name: str) -> str:
    """The name as a C identifier; two names with the same one collide."""
    return re.sub(r"[^A-Za-z0-9_]", "_", name)


def kind_of(expression: Expression) -> str:
    """The one key that says what is defined."""
    kinds = [kind for kind in KINDS if kind in expression.value]
    if len(kinds) != 1:
        raise QapiError(expression.where, "expression must have exactly one key of: " + ", ".join(KINDS))
    return kinds[0]


def check_expression(expression: Expression, pragma: Pragma) -> None:
    """Raise QapiError if the expression is malformed; expand its short forms."""
    _Check(expression, kind_of(expression), pragma).run()


class _Check:
    def __init__(self, expression: Expression, kind: str, pragma: Pragma) -> None:
        self._value = expression.value
        self._where: Where = expression.where
        self._doc = expression.doc
        self._kind = kind
        self._pragma = pragma
        self._name: Any = expression.value[kind]

    def fail(self, text: str) -> QapiError:
        return QapiError(self._where, f"{self._kind} '{self._name}': {text}")

    def run(self) -> None:
        if not isinstance(self._name, str):
            raise QapiError(self._where, f"'{self._kind}' key must have a string value")
        self._definition_name()
        self._documented()
        own = ("reads-only", "role") if self._kind == "command" and self._pragma.gmemd_extensions else ()
        self._keys(self._value, (self._kind, *_MANDATORY[self._kind]), (*_OPTIONAL[self._kind], *own), self._kind)
        self._flags()
        getattr(self, "_" + self._kind)()
        self._condition(self._value, self._kind)
        self._features(self._value, self._kind)

    # -- names

    def _stem(self, name: Any, what: str) -> str:
        if not isinstance(name, str):
            raise self.fail(f"{what} requires a string name")
        match = _NAME.fullmatch(name)
        if not match or c_name(name).startswith("q_"):
            raise self.fail(f"{what} has an invalid name")
        return match.group(1)

    def _lower(self, name: Any, what: str, *, upper: bool = False, underscore: bool = False) -> None:
        stem = self._stem(name, what)
        if (not upper and stem != stem.lower()) or (not underscore and "_" in stem):
            raise self.fail(f"name of {what} must not use uppercase or '_'")

    def _definition_name(self) -> None:
        name = self._name
        if self._kind == "event":
            if re.search(r"[a-z-]", self._stem(name, self._kind)):
                raise self.fail("name of event must not use lowercase or '-'")
        elif self._kind == "command":
            self._lower(name, "command", underscore=name in self._pragma.command_name_exceptions)
        else:
            if not re.fullmatch(r"[A-Z][A-Za-z0-9]*[a-z][A-Za-z0-9]*", self._stem(name, self._kind)):
                raise self.fail(f"name of {self._kind} must use CamelCase")
            if name.endswith("List"):
                raise self.fail(f"{self._kind} name should not end in 'List'")

    def _documented(self) -> None:
        if self._doc is None:
            if self._pragma.doc_required:
                raise self.fail("documentation comment required")
        elif self._doc.symbol != self._name:
            raise self.fail(f"documentation comment is for '{self._doc.symbol}'")

    # -- common to several kinds

    def _keys(self, value: Any, mandatory: tuple[str, ...], optional: tuple[str, ...], what: str) -> None:
        self._object_value(value, what)
        for key in mandatory:
            if key not in value:
                raise self.fail(f"{what} misses key '{key}'")
        for key in value:
            if key not in mandatory and key not in optional:
                raise self.fail(f"{what} has unknown key '{key}'")

    def _flags(self) -> None:
        if self._value.get("role", _ROLES[0]) not in _ROLES:
            raise self.fail("'role' must be one of: " + ", ".join(_ROLES))
        for key, only in _FLAGS.items():
            if self._value.get(key, only) is not only:
                raise self.fail(f"flag '{key}' may only use {str(only).lower()} value")
        if "allow-oob" in self._value and "coroutine" in self._value:
            raise self.fail("flags 'allow-oob' and 'coroutine' are incompatible")

    def _condition(self, value: dict[str, Any], what: str) -> None:
        if "if" in value:
            self._one_condition(value["if"], what)

    def _one_condition(self, condition: Any, what: str) -> None:
        if isinstance(condition, str):
            if not _CONDITION.fullmatch(condition):
                raise self.fail(f"'if' condition '{condition}' of {what} is not a valid identifier")
            return
        if not isinstance(condition, dict):
            raise self.fail(f"'if' condition of {what} must be a string or an object")
        self._keys(condition, (), ("all", "any", "not"), f"'if' condition of {what}")
        if len(condition) != 1:
            raise self.fail(f"'if' condition of {what} has conflicting keys")
        if "not" in condition:
            self._one_condition(condition["not"], what)
            return
        key, parts = next(iter(condition.items()))
        if not isinstance(parts, list):
            raise self.fail(f"'{key}' condition of {what} must be a list")
        if not parts:
            raise self.fail(f"'if' condition {{}} of {what} is useless")
        for part in parts:
            self._one_condition(part, what)

    def _features(self, value: dict[str, Any], what: str) -> None:
        if "features" not in value:
            return
        if not isinstance(value["features"], list):
            raise self.fail(f"'features' of {what} must be a list")
        value["features"] = features = [_spell(item, "name") for item in value["features"]]
        for feature in features:
            label = f"'features' member of {what}"
            self._keys(feature, ("name",), ("if",), label)
            self._lower(feature["name"], label)
            self._condition(feature, label)

    def _object_value(self, value: Any, what: str) -> None:
        if not isinstance(value, dict):
            raise self.fail(f"{what} must be an object")

    def _type(self, value: Any, what: str, *, array: bool = True) -> None:
        if isinstance(value, str):
            return
        if isinstance(value, list):
            if not array:
                raise self.fail(f"{what} cannot be an array")
            if len(value) != 1 or not isinstance(value[0], str):
                raise self.fail(f"{what}: array type must contain single type name")
            return
        raise self.fail(f"{what} should be a type name" + (" or array" if array else ""))

    def _members(self, members: Any, what: str) -> None:
        if not isinstance(members, dict):
            raise self.fail(f"{what} should be an object or type name")
        permissive = self._name in self._pragma.member_name_exceptions
        extra = _EXTENSION_KEYS if self._pragma.gmemd_extensions else ()
        for key in members:
            label = f"{what} member '{key}'"
            name = key.removeprefix("*")
            self._lower(name, label, upper=permissive, underscore=permissive)
            if c_name(name) == "u" or c_name(name).startswith("has_"):
                raise self.fail(f"{label} uses reserved name")
            members[key] = member = _spell(members[key], "type")
            self._keys(member, ("type",), ("if", "features", *extra), label)
            self._condition(member, label)
            self._features(member, label)
            self._type(member["type"], label)
            if "qom" in member:
                self._keys(member["qom"], (), ("type", "description"), f"'qom' of {label}")

    # -- the kinds

    def _enum(self) -> None:
        values = self._value["data"]
        if not isinstance(values, list):
            raise self.fail("'data' must be an array")
        if "prefix" in self._value and not isinstance(self._value["prefix"], str):
            raise self.fail("'prefix' must be a string")
        permissive = self._name in self._pragma.member_name_exceptions
        self._value["data"] = values = [_spell(item, "name") for item in values]
        for value in values:
            self._keys(value, ("name",), ("if", "features"), "'data' member")
            name = value["name"]
            label = f"'data' member '{name}'"
            if isinstance(name, str) and name[:1].isdigit():
                name = "d" + name  # values may begin with a digit
            self._lower(name, label, upper=permissive, underscore=permissive)
            self._condition(value, label)
            self._features(value, label)

    def _struct(self) -> None:
        self._members(self._value["data"], "'data'")
        if "base" in self._value:
            self._type(self._value["base"], "'base'", array=False)

    def _union(self) -> None:
        base = self._value["base"]
        if isinstance(base, dict):
            self._members(base, "'base'")
        else:
            self._type(base, "'base'", array=False)
        if not isinstance(self._value["discriminator"], str):
            raise self.fail("'discriminator' requires a string name")
        self._branches(array=False)

    def _alternate(self) -> None:
        self._branches(array=True)
        if not self._value["data"]:
            raise self.fail("'data' must not be empty")

    def _branches(self, *, array: bool) -> None:
        branches = self._value["data"]
        self._object_value(branches, "'data'")
        union = self._kind == "union"
        optional = ("if", "defaults") if union and self._pragma.gmemd_extensions else ("if",)
        for key in branches:
            label = f"'data' member '{key}'"
            if not union:  # a union's branches are named by its enum
                self._lower(key, label)
            branches[key] = branch = _spell(branches[key], "type")
            self._keys(branch, ("type",), optional, label)
            self._condition(branch, label)
            self._type(branch["type"], label, array=array)
            self._object_value(branch.get("defaults", {}), f"'defaults' of {label}")

    def _arguments(self) -> None:
        data = self._value.get("data")
        boxed = self._value.get("boxed", False)
        if boxed and data is None:
            raise self.fail("'boxed': true requires 'data'")
        if isinstance(data, dict) and not boxed:
            self._members(data, "'data'")
        elif data is not None:
            self._type(data, "'data'", array=False)

    def _command(self) -> None:
        self._arguments()
        if self._value.get("returns") is not None:
            self._type(self._value["returns"], "'returns'")

    _event = _arguments


def _spell(value: Any, key: str) -> Any:
    """Expand a short form: 'x' or ['x'] to {KEY: ...}."""
    return {key: value} if isinstance(value, str | list) else value
