"""The rules between QAPI definitions: types exist and fit, members do not collide.

docs/devel/qapi-code-gen of QEMU, "Schema syntax"; rules.py checks the form of each definition.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gmemd.qapi.doc import Doc
from gmemd.qapi.entities import (
    EMPTY,
    Alternate,
    Array,
    Command,
    Definition,
    Entities,
    Enum,
    EnumValue,
    Event,
    Feature,
    Member,
    Object,
    Type,
)
from gmemd.qapi.rules import c_name
from gmemd.qapi.tokens import QapiError, Where


def check_entities(entities: Entities) -> None:
    """Raise QapiError for the first definition that does not fit the others."""
    check = _Check(entities)
    for entity in entities.visited:
        check.definition(entity)
    check.feature_count()


class _Check:
    def __init__(self, entities: Entities) -> None:
        self._entities = entities

    def definition(self, entity: Definition) -> None:
        label = f"{entity.kind.lower()} '{entity.name}'"
        _unique((feature.name for feature in entity.features), entity.where, f"{label}: feature")
        if isinstance(entity, Enum):
            self._parts(entity.values, entity.where, f"{label}: value")
        elif isinstance(entity, Object):
            self._object(entity, label)
        elif isinstance(entity, Alternate):
            self._alternate(entity, label)
        elif isinstance(entity, Command | Event):
            self._arguments(entity, label)
        if isinstance(entity, Command):
            self._returns(entity, label)
        if not isinstance(entity, Command | Event):
            self._special_features(entity.features, entity.where, label)
        self._documented(entity, label)

    def feature_count(self) -> None:
        """Refuse the definition whose features no longer fit into a set of 64 bits."""
        names = {"deprecated", "unstable"}
        for entity in self._entities.visited:
            names.update(self._described(entity)[1])
            if len(names) > 64:
                raise QapiError(entity.where, "maximum of 64 schema features is permitted")

    def _resolve(self, reference: str, where: Where, label: str) -> Type:
        try:
            return self._entities.type(reference)
        except KeyError:
            raise QapiError(where, f"{label} uses unknown type '{reference.strip('[]')}'") from None

    @staticmethod
    def _special_features(features: tuple[Feature, ...], where: Where, label: str) -> None:
        for feature in features:
            if feature.name in ("deprecated", "unstable"):
                raise QapiError(where, f"{label}: feature '{feature.name}' is not supported for types")

    @staticmethod
    def _parts(parts: Sequence[Member | EnumValue], where: Where, label: str) -> None:
        """Refuse members or values of the same name, and features of one."""
        _unique((part.name for part in parts), where, label)
        for part in parts:
            _unique((feature.name for feature in part.features), where, f"{label} '{part.name}': feature")

    # -- objects

    def _object(self, entity: Object, label: str) -> None:
        members = self._all_members(entity, label, ())
        self._parts(members, entity.where, f"{label}: member")
        if entity.tag is not None:
            self._tag(entity, label, members)
            self._branches(entity, label, members)

    def _all_members(self, entity: Object, label: str, seen: tuple[str, ...]) -> list[Member]:
        """Collect all members, resolving their types and the bases; refuse an object that contains itself."""
        if entity.name in seen:
            raise QapiError(entity.where, f"object {entity.name} contains itself")
        inherited: list[Member] = []
        if entity.base is not None:
            base = self._resolve(entity.base, entity.where, label)
            if not isinstance(base, Object) or base.name == EMPTY:
                raise QapiError(entity.where, f"{label}: 'base' requires a struct type, not '{base.name}'")
            if base.tag is not None:
                raise QapiError(entity.where, f"{label}: 'base' '{base.name}' must not have branches")
            inherited = self._all_members(base, label, (*seen, entity.name))
        for member in entity.members:
            self._resolve(member.type, member.where, f"{label}: member '{member.name}'")
        return [*inherited, *entity.members]

    def _tag(self, entity: Object, label: str, members: list[Member]) -> None:
        tag = next((member for member in members if member.name == entity.tag), None)
        if tag is None:
            raise QapiError(entity.where, f"{label}: discriminator '{entity.tag}' is not a member of 'base'")
        enum = self._entities.type(tag.type)
        if not isinstance(enum, Enum):
            raise QapiError(entity.where, f"{label}: discriminator '{entity.tag}' must be of enum type")
        if tag.optional:
            raise QapiError(entity.where, f"{label}: discriminator '{entity.tag}' must not be optional")
        if tag.condition is not None:
            raise QapiError(entity.where, f"{label}: discriminator '{entity.tag}' must not be conditional")
        values = {value.name for value in enum.values}
        for branch in entity.branches:
            if branch.name not in values:
                raise QapiError(entity.where, f"{label}: branch '{branch.name}' is not a value of '{enum.name}'")
        if not enum.values:
            raise QapiError(entity.where, f"{label} has no branches")

    def _branches(self, entity: Object, label: str, members: list[Member]) -> None:
        _unique((branch.name for branch in entity.branches), entity.where, f"{label}: branch")
        for branch in entity.branches:
            what = f"{label}: branch '{branch.name}'"
            kind = self._resolve(branch.type, entity.where, what)
            if not isinstance(kind, Object):
                raise QapiError(entity.where, f"{what} cannot use type '{kind.name}', it is not a struct")
            added = self._all_members(kind, what, (entity.name,))
            _unique((member.name for member in [*members, *added]), entity.where, f"{what}: member")
            if kind.tag is not None:
                self._branches(kind, what, [*members, *added])
            unknown = [name for name in branch.defaults if name not in {m.name for m in added}]
            if unknown:
                raise QapiError(entity.where, f"{what}: default for '{unknown[0]}', which is not a member")

    # -- alternates

    def _alternate(self, entity: Alternate, label: str) -> None:
        _unique((branch.name for branch in entity.branches), entity.where, f"{label}: branch")
        taken: dict[str, str] = {}
        for branch in entity.branches:
            what = f"{label}: branch '{branch.name}'"
            kind = self._resolve(branch.type, entity.where, what)
            for json_type in self._json_types(kind, entity, what):
                if json_type in taken:
                    raise QapiError(entity.where, f"{what} can't be distinguished from '{taken[json_type]}'")
                taken[json_type] = branch.name

    def _json_types(self, kind: Type, entity: Alternate, what: str) -> set[str]:
        """The JSON types that a branch claims; words that look like other types on a command line claim those too."""
        if isinstance(kind, Array):
            return {"array"}
        if isinstance(kind, Object):
            return {"object"}
        if isinstance(kind, Enum):
            claims = {"string"}
            for value in kind.values:
                if value.name in ("on", "off"):
                    claims.add("boolean")
                if value.name[:1].isdigit() or value.name[:1] in "+-.":
                    claims.add("number")
            return claims
        if isinstance(kind, Alternate) or kind.json_type == "value":
            raise QapiError(entity.where, f"{what} cannot use type '{kind.name}'")
        if kind.json_type == "string":
            return {"string", "boolean", "number"} if len(entity.branches) > 1 else {"string"}
        return {"number" if kind.json_type == "int" else kind.json_type}

    # -- commands and events

    def _arguments(self, entity: Command | Event, label: str) -> None:
        if entity.arg is None:
            return
        kind = self._resolve(entity.arg, entity.where, f"{label}: 'data'")
        if isinstance(kind, Object) and kind.implicit:
            self._object(kind, label)
        if not isinstance(kind, Object | Alternate) or (isinstance(kind, Alternate) and not entity.boxed):
            raise QapiError(entity.where, f"{label}: 'data' cannot take type '{kind.name}'")
        if isinstance(kind, Alternate):
            raise QapiError(entity.where, f"{label}: 'data' cannot take alternate type '{kind.name}'")
        if kind.tag is not None and not entity.boxed:
            raise QapiError(entity.where, f"{label}: 'data' can take union type '{kind.name}' only with 'boxed': true")

    def _returns(self, entity: Command, label: str) -> None:
        if entity.returns is None:
            return
        kind = self._resolve(entity.returns, entity.where, f"{label}: 'returns'")
        if entity.name in self._entities.pragma.command_returns_exceptions:
            return
        element = self._entities.type(kind.element) if isinstance(kind, Array) else kind
        if not isinstance(element, Object):
            raise QapiError(entity.where, f"{label}: 'returns' cannot take type '{kind.name}'")

    # -- documentation

    def _documented(self, entity: Definition, label: str) -> None:
        """Refuse documentation of what does not exist, and definitions that lack required documentation."""
        doc = entity.doc
        if doc is None:
            return
        members, features = self._described(entity)
        self._exist(doc, "member", doc.members, members)
        self._exist(doc, "feature", doc.features, features)
        for name in features:
            if name not in doc.features:
                raise QapiError(entity.where, f"{label}: feature '{name}' lacks documentation")
        self._returns_described(entity, doc)
        pragma = self._entities.pragma
        if not pragma.documentation_exceptions and not pragma.gmemd_extensions:
            return  # QEMU before 9.1 requires no more
        for name in members:
            if name not in doc.members and entity.name not in pragma.documentation_exceptions:
                raise QapiError(entity.where, f"{label}: '{name}' lacks documentation")

    @staticmethod
    def _exist(doc: Doc, what: str, said: Iterable[str], there: Iterable[str]) -> None:
        for name in said:
            if name not in there:
                raise QapiError(doc.lines[f"@{name}"], f"documented {what} '{name}' does not exist")

    @staticmethod
    def _returns_described(entity: Definition, doc: Doc) -> None:
        for section in ("Returns", "Errors"):
            if section in doc.sections and not isinstance(entity, Command):
                raise QapiError(doc.lines[section], f"'{section}' section is only valid for commands")

    def _described(self, entity: Definition) -> tuple[dict[str, None], dict[str, None]]:
        """Names that the documentation of this definition must describe: members, features."""
        features = dict.fromkeys(feature.name for feature in entity.features)
        parts: tuple[Member | EnumValue, ...] = ()
        if isinstance(entity, Enum):
            parts = entity.values
        elif isinstance(entity, Alternate):
            return dict.fromkeys(branch.name for branch in entity.branches), features
        elif isinstance(entity, Object):
            parts = (*self._implicit_members(entity.base), *entity.members)
        elif isinstance(entity, Command | Event):
            parts = self._implicit_members(entity.arg)
        for part in parts:
            features.update(dict.fromkeys(feature.name for feature in part.features))
        return dict.fromkeys(part.name for part in parts), features

    def _implicit_members(self, name: str | None) -> tuple[Member, ...]:
        """The members of a type written inside another definition."""
        kind = self._entities.types.get(name or "")
        return kind.members if isinstance(kind, Object) and kind.implicit else ()


def _unique(names: Iterable[str], where: Where, label: str) -> None:
    """Refuse two names that give the same identifier."""
    seen: dict[str, str] = {}
    for name in names:
        key = c_name(name)
        if key in seen:
            raise QapiError(where, f"{label} '{name}' collides with '{seen[key]}'")
        seen[key] = name
