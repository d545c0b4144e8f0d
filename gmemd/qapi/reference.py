"""docs/reference.md: every command, event and type, from the QAPI source."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence

from gmemd.qapi.doc import Doc
from gmemd.qapi.document import default_value
from gmemd.qapi.entities import (
    EMPTY,
    MISSING,
    Branch,
    Command,
    Definition,
    Entities,
    Enum,
    Event,
    Member,
    Object,
)

_HEAD = """\
# Reference

Every command, event and type that gmemd speaks.
Generated from `gmemd/schema/qapi/` by `python -m gmemd.qapi --write`; change it there.

Versions are QEMU's unless gmemd is named.
An argument without a default may be left out only where it is marked *optional*.
"""


def reference(entities: Entities) -> str:
    """The page as Markdown."""
    return "\n".join(_Page(entities).lines()) + "\n"


class _Page:
    def __init__(self, entities: Entities) -> None:
        self._entities = entities

    def lines(self) -> Iterator[str]:
        yield _HEAD
        for module in self._entities.modules:
            yield from self._free(doc for where, doc in self._entities.free_docs if where == module)
            for entity in self._entities.visited:
                if entity.module == module:
                    yield from self._entity(entity)

    @staticmethod
    def _free(docs: Iterable[Doc]) -> Iterator[str]:
        for doc in docs:
            first, _, rest = doc.text.partition("\n")
            yield f"## {first.removeprefix('=').strip()}" if first.startswith("=") else first
            yield from (rest, "")

    def _entity(self, entity: Definition) -> Iterator[str]:
        yield from (f"### {entity.kind} `{entity.name}`", "")
        if entity.doc and entity.doc.text:
            yield from (entity.doc.text, "")
        if isinstance(entity, Enum):
            yield from self._enum(entity)
        elif isinstance(entity, Object):
            yield from self._object(entity)
        elif isinstance(entity, Command | Event):
            yield from self._arguments(entity)
        yield from self._rest(entity)

    # -- the kinds

    @staticmethod
    def _enum(entity: Enum) -> Iterator[str]:
        yield from _table(("value", "meaning"), ([f"`{v.name}`", _cell(v.doc)] for v in entity.values))

    def _object(self, entity: Object) -> Iterator[str]:
        base = self._entities.types.get(entity.base or "")
        if isinstance(base, Object) and not base.implicit:
            more = ", and:" if entity.members else "."
            yield from (f"All members of {self._type(base.name)}{more}", "")
            yield from self._members(entity.members)
        else:
            yield from self._members(self._entities.members(entity))
        for branch in self._entities.branches(entity):
            if branch.type != EMPTY:
                yield from (self._branch(entity, branch), "")

    def _branch(self, entity: Object, branch: Branch) -> str:
        line = f"- With `{entity.tag}` `{branch.name}`: the members of {self._type(branch.type)}"
        defaults = [f"`{name}` is `{json.dumps(value)}`" for name, value in branch.defaults.items()]
        return f"{line}; by default {', '.join(defaults)}" if defaults else line

    def _arguments(self, entity: Command | Event) -> Iterator[str]:
        if entity.arg is None:
            return
        kind = self._entities.types[entity.arg]
        if isinstance(kind, Object) and kind.implicit:
            yield from self._members(kind.members)
        else:
            yield from (f"Arguments: {self._type(entity.arg)}", "")

    def _members(self, members: Sequence[Member]) -> Iterator[str]:
        rows = [[f"`{m.name}`", self._type(m.type), self._default(m), _cell(m.doc) + _features(m)] for m in members]
        if rows:
            yield from _table(("name", "type", "default", "meaning"), rows)

    def _default(self, member: Member) -> str:
        if member.default is not MISSING:
            return f"`{json.dumps(default_value(self._entities, member.type, member.default))}`"
        return "*optional*" if member.optional else ""

    def _type(self, reference: str) -> str:
        """Name a type, with a link to where it is described."""
        if reference.startswith("["):
            return f"list of {self._type(reference[1:-1])}"
        kind = self._entities.types[reference]
        if not isinstance(kind, Definition):
            return f"`{reference}`"
        return f"[`{reference}`](#{kind.kind.lower()}-{reference.lower()})"

    def _rest(self, entity: Definition) -> Iterator[str]:
        sections = entity.doc.sections if entity.doc else {}
        if isinstance(entity, Command) and entity.returns is not None:
            yield from (f"Returns {self._type(entity.returns)}: {_cell(sections.get('Returns'))}.", "")
        if "Errors" in sections:
            yield from ("Errors:", "", sections["Errors"], "")
        if isinstance(entity, Command) and entity.reads_only:
            yield from ("Only reads.", "")
        if isinstance(entity, Command) and entity.role is not None:
            yield from (f"Role: {entity.role}.", "")
        if isinstance(entity, Command) and entity.allow_oob:
            yield from ("May be sent out of band (`exec-oob`).", "")
        for feature in entity.features:
            text = entity.doc.features.get(feature.name, "") if entity.doc else ""
            yield from (f"Feature `{feature.name}`: {_cell(text)}.", "")
        if "Since" in sections:
            yield from (f"Since {_cell(sections['Since'])}.", "")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def _features(member: Member) -> str:
    return "".join(f" (*{feature.name}*)" for feature in member.features)


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")
