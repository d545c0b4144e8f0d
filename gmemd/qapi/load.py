"""The QAPI compiler: a schema directory → entities.

`load` reads QAPI's own language as QEMU's compiler does and refuses what it refuses; it also reads the
`qapi/` directory of a QEMU source tree unchanged.
Entities are in the order in which QEMU visits them: module by module, modules in order of first mention.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gmemd.qapi.checks import check_entities
from gmemd.qapi.entities import (
    BUILTINS,
    EMPTY,
    MISSING,
    Alternate,
    Branch,
    Builtin,
    Command,
    Definition,
    Entities,
    Enum,
    EnumValue,
    Event,
    Feature,
    Member,
    Object,
)
from gmemd.qapi.rules import check_expression, kind_of
from gmemd.qapi.text import Expression, Source, read_file
from gmemd.qapi.tokens import QapiError, Where

__all__ = ["QapiError", "load", "main_file"]


def main_file(path: Path) -> Path:
    """The file to begin with: `path` itself, or qapi-schema.json in it or in its directory qapi."""
    for candidate in (path, path / "qapi-schema.json", path / "qapi" / "qapi-schema.json"):
        if candidate.is_file():
            return candidate
    return path / "qapi-schema.json"


def load(path: Path) -> Entities:
    """Compile the schema at `path` (a file, a qapi directory or a QEMU source tree); raise QapiError."""
    source = Source()
    read_file(main_file(path), source)
    for expression in source.expressions:
        check_expression(expression, source.pragma)
    entities = _Builder(source).build()
    check_entities(entities)
    return entities


class _Builder:
    """Builds entities from checked expressions; refuses a duplicate name."""

    def __init__(self, source: Source) -> None:
        self._source = source
        builtin = Where("builtin", 1)
        self._types: dict[str, Builtin | Enum | Object | Alternate] = {name: Builtin(name, json_type)
                                                                       for name, json_type in BUILTINS.items()}
        qtypes = ("none", "qnull", "qnum", "qstring", "qdict", "qlist", "qbool")
        self._types["QType"] = Enum("QType", builtin, "", values=tuple(map(EnumValue, qtypes)), prefix="QTYPE")
        self._types[EMPTY] = Object(EMPTY, builtin, "", implicit=True)
        self._defined: dict[str, Where] = dict.fromkeys(self._types, builtin)
        self._all: list[Definition] = []

    def build(self) -> Entities:
        for expression in self._source.expressions:
            self._all.append(self._definition(expression))
        rank = {module: index for index, module in enumerate(self._source.modules)}
        visited = sorted(self._all, key=lambda entity: rank[entity.module])
        return Entities(self._source.pragma, self._types,
                        {entity.name: entity for entity in visited if isinstance(entity, Command)},
                        {entity.name: entity for entity in visited if isinstance(entity, Event)}, visited,
                        self._source.free_docs, self._source.modules)

    def _claim(self, name: str, where: Where) -> None:
        if name in self._defined:
            raise QapiError(where, f"'{name}' is already defined at {self._defined[name]}")
        self._defined[name] = where

    def _definition(self, expression: Expression) -> Definition:
        kind = kind_of(expression)
        value = expression.value
        name = value[kind]
        self._claim(name, expression.where)
        common = {"name": name, "where": expression.where, "module": expression.module, "condition": value.get("if"),
                  "features": _features(value), "doc": expression.doc}
        made: Definition = getattr(self, "_" + kind)(common, value, expression)
        if isinstance(made, Enum | Object | Alternate):
            self._types[name] = made
        return made

    def _enum(self, common: dict[str, Any], value: dict[str, Any], expression: Expression) -> Enum:
        described = expression.doc.members if expression.doc else {}
        values = tuple(EnumValue(item["name"], item.get("if"), _features(item), described.get(item["name"]))
                       for item in value["data"])
        return Enum(**common, values=values, prefix=value.get("prefix"))

    def _struct(self, common: dict[str, Any], value: dict[str, Any], expression: Expression) -> Object:
        members = _members(value["data"], expression)
        return Object(**common, base=value.get("base"), members=members)

    def _union(self, common: dict[str, Any], value: dict[str, Any], expression: Expression) -> Object:
        base = value["base"]
        if isinstance(base, dict):
            base = self._implicit(expression, "base", base, common)
        return Object(**common, base=base, tag=value["discriminator"], branches=_branches(value["data"]))

    def _alternate(self, common: dict[str, Any], value: dict[str, Any], expression: Expression) -> Alternate:
        return Alternate(**common, branches=_branches(value["data"]))

    def _command(self, common: dict[str, Any], value: dict[str, Any], expression: Expression) -> Command:
        returns = value.get("returns")
        return Command(**common, arg=self._arg(expression, value, common),
                       returns=None if returns is None else _reference(returns), boxed=value.get("boxed", False),
                       allow_oob=value.get("allow-oob", False), gen=value.get("gen", True),
                       reads_only=value.get("reads-only", False))

    def _event(self, common: dict[str, Any], value: dict[str, Any], expression: Expression) -> Event:
        return Event(**common, arg=self._arg(expression, value, common), boxed=value.get("boxed", False))

    def _arg(self, expression: Expression, value: dict[str, Any], common: dict[str, Any]) -> str | None:
        data = value.get("data")
        if isinstance(data, dict):
            return self._implicit(expression, "arg", data, common) if data else None
        return data

    def _implicit(self, expression: Expression, role: str, data: dict[str, Any], common: dict[str, Any]) -> str:
        name = f"q_obj_{common['name']}-{role}"
        inner = {**common, "name": name, "features": ()}
        self._types[name] = Object(**inner, members=_members(data, expression), implicit=True)
        return name


def _features(value: dict[str, Any]) -> tuple[Feature, ...]:
    return tuple(Feature(item["name"], item.get("if")) for item in value.get("features", ()))


def _reference(value: str | list[str]) -> str:
    return f"[{value[0]}]" if isinstance(value, list) else value


def _members(data: dict[str, Any], expression: Expression) -> tuple[Member, ...]:
    described = expression.doc.members if expression.doc else {}
    return tuple(_member(key, value, expression.where, described) for key, value in data.items())


def _member(key: str, value: dict[str, Any], where: Where, described: dict[str, str]) -> Member:
    name = key.removeprefix("*")
    qom = value.get("qom", {})
    return Member(name, _reference(value["type"]), where, optional=key != name, condition=value.get("if"),
                  features=_features(value), doc=described.get(name), default=value.get("default", MISSING),
                  accepts_bool=value.get("accepts-bool", False), qom_type=qom.get("type"),
                  qom_description=qom.get("description"))


def _branches(data: dict[str, Any]) -> tuple[Branch, ...]:
    return tuple(Branch(name, _reference(item["type"]), item.get("if"), item.get("defaults", {}))
                 for name, item in data.items())
