"""Whatever the arguments, every way of checking them comes to the same end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gmemd.schema.validate
from gmemd.errors import QmpError
from gmemd.qapi.entities import Array, Builtin, Entities, Enum, Object
from gmemd.qapi.load import load
from gmemd.schema.explain import failed
from gmemd.schema.validate import Schema
from tests.schema.reference_visitor import Fault, Visitor

ENTITIES = load(Path(gmemd.schema.validate.__file__).parent / "qapi")
SCHEMA = Schema.load(lab=True)
REJECTING = Schema.load(unstable_input="reject", lab=True)

EDGES = [-(2**63) - 1, -(2**63), -1, 0, 1, 2**16 - 1, 2**16, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**64]
WORDS = ["", "x", "on", "off", "auto", "default", "bind", "oob", "chardev", "memory-backend-ram", "\u20ac"]
NAMES = ["foo", "id2", "Size", "size", "seal", "align", "p1", "p2", "p3", "p4", "p5", "p6", "p7", "a.b[0]", ""]

scalars = (
    st.none()
    | st.booleans()
    | st.sampled_from(EDGES)
    | st.integers(-10, 10)
    | st.sampled_from([0.0, 1.0, -1.0, 0.5, 1e300, float("inf")])
    | st.sampled_from(WORDS)
)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3)
)


class Generator:
    """Strategies for values that are mostly right, from the QAPI entities."""

    def __init__(self, entities: Entities) -> None:
        self.entities = entities

    def value(self, reference: str) -> st.SearchStrategy[Any]:
        kind = self.entities.type(reference)
        if isinstance(kind, Array):
            return st.lists(self.mostly(kind.element), max_size=3)
        if isinstance(kind, Enum):
            return st.sampled_from([value.name for value in kind.values])
        if isinstance(kind, Object):
            return self.object(kind)
        assert isinstance(kind, Builtin)
        return {
            "str": st.sampled_from(WORDS),
            "bool": st.booleans(),
            "any": anything,
        }.get(kind.name, st.sampled_from(EDGES) | st.integers(0, 10))

    def mostly(self, reference: str) -> st.SearchStrategy[Any]:
        right = self.value(reference)
        return st.one_of(right, right, right, anything)

    def object(self, kind: Object) -> st.SearchStrategy[dict[str, Any]]:
        @st.composite
        def build(draw: st.DrawFn) -> dict[str, Any]:
            members = list(self.entities.members(kind))
            if kind.tag:
                branch = draw(st.sampled_from(self.entities.branches(kind)))
                added = self.entities.types[branch.type]
                assert isinstance(added, Object)
                members += self.entities.members(added)
            found = []
            for member in members:
                if draw(st.integers(0, 9)) < (3 if member.optional else 9):
                    right = kind.tag == member.name and draw(st.integers(0, 9)) < 9
                    found.append((member.name, branch.name if right else draw(self.mostly(member.type))))
            if draw(st.integers(0, 3)) == 0:
                found += draw(st.lists(st.tuples(st.sampled_from(NAMES), scalars), max_size=9))
            return dict(draw(st.permutations(found)))

        return build()

    def arguments(self, command: str) -> st.SearchStrategy[dict[str, Any]]:
        kind = self.entities.types[self.entities.commands[command].arg or "q_empty"]
        assert isinstance(kind, Object)
        return self.object(kind)


GENERATOR = Generator(ENTITIES)
WITH_ARGUMENTS = [name for name, command in ENTITIES.commands.items() if command.arg]


def whole_document_validator(command: str) -> Any:
    """jsonschema on qom.json as anybody would use it, but with 1.0 no integer."""
    key = SCHEMA.commands[command].arguments
    return strict_validator({"$ref": f"#/$defs/{key}", "$defs": SCHEMA.document["$defs"]})


def strict_validator(schema: dict[str, Any]) -> Any:
    """jsonschema, but 1.0 is not an integer, and true is not a number."""
    base: Any = jsonschema.Draft202012Validator
    types = base.TYPE_CHECKER.redefine_many({"integer": lambda checker, value: type(value) is int,
                                             "number": lambda checker, value: type(value) in (int, float)})
    strict: Any = jsonschema.validators.extend(base, type_checker=types)  # type: ignore[no-untyped-call]
    return strict(schema)


def outcome(check: Any, *arguments: Any) -> tuple[Any, str | None]:
    """The completed arguments, or the sentence."""
    try:
        return check(*arguments), None
    except (QmpError, Fault) as error:
        return None, error.args[0]


# object-add has the most to get wrong
commands = st.sampled_from([*WITH_ARGUMENTS, *["object-add"] * len(WITH_ARGUMENTS)])
examples = settings(max_examples=100, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize("schema", [SCHEMA, REJECTING], ids=["accept", "reject"])
@examples
@given(command=commands, data=st.data())
def test_all_paths_agree(schema: Schema, command: str, data: st.DataObject) -> None:
    """The closures, the judge alone and the reference visitor accept the same, read the same and say the same."""
    arguments = data.draw(GENERATOR.arguments(command))
    key = schema.commands[command].arguments
    visitor = Visitor(ENTITIES, reject_unstable=schema is REJECTING)
    completed, sentence = outcome(schema.commands[command].check, arguments)
    read, fault = outcome(visitor.command, command, arguments)
    assert fault == sentence
    assert same(without_defaults(completed, arguments), read)
    assert outcome(schema.judge.check, key, arguments) == (completed, sentence)


def without_defaults(completed: Any, given: Any) -> Any:
    """The completed value without the members that were not given."""
    if isinstance(given, dict) and isinstance(completed, dict):
        return {name: without_defaults(completed[name], value) for name, value in given.items()}
    if isinstance(given, list) and isinstance(completed, list):
        return [without_defaults(mine, value) for mine, value in zip(completed, given, strict=True)]
    return completed


def same(mine: Any, other: Any) -> bool:
    """Whether two values are equal and of the same types: 1 is neither True nor 1.0."""
    return json.dumps(mine, sort_keys=True) == json.dumps(other, sort_keys=True)


VALUES: list[Any] = [None, True, False, *EDGES, 0.0, 1.0, -1.5, *WORDS, "\udcff", [], [0], [1, -1], [65536], ["a"],
                     [1, "a"], [None], {}, {"a": 1}, {"type": "chardev", "id": "c"}, [{"type": "x"}],
                     {"type": "object-add"}]


@pytest.mark.parametrize("document", ["qom.json", "emulator.json"])
def test_closures_accept_what_is_right_and_stored_as_it_is(document: str) -> None:
    """For each kind of member: all plain values, and nothing that jsonschema refuses or that is stored differently."""
    schema = Schema.load(document, lab=True)
    definitions, seen = schema.document["$defs"], set()
    for key, definition in definitions.items():
        for name, member in definition.get("properties", {}).items():
            text = json.dumps({word: value for word, value in member.items() if word != "description"})
            if text in seen:
                continue
            seen.add(text)
            accepts = schema.shapes.check(member)
            is_valid = strict_validator({**member, "$defs": definitions}).is_valid
            words = definitions[member["$ref"].rpartition("/")[2]].get("enum", []) if "$ref" in member else []
            for value in [*VALUES, *words]:
                stored = outcome(schema.judge.property, key, name, value)
                assert (accepts(value), name, value) == (is_valid(value) and same(stored[0], value), name, value)
    assert len(seen) > 50


def kinds_of_values() -> list[dict[str, Any]]:
    """What qom.json, emulator.json and other people's QAPI may ask of one value, without what is inside."""
    found: dict[str, dict[str, Any]] = {}
    schemas: list[Any] = [{"type": kind} for kind in ("number", "null", "object")]
    for document in ("qom.json", "emulator.json"):
        for definition in Schema.load(document, lab=True).document["$defs"].values():
            schemas += [definition, *definition.get("properties", {}).values()]
    for schema in schemas:
        asked = {keyword: schema[keyword] for keyword in ("type", "enum", "minimum", "maximum") if keyword in schema}
        found[json.dumps(asked)] = asked
    return list(found.values())


@settings(max_examples=1000, deadline=None, derandomize=True, database=None)
@given(schema=st.sampled_from(kinds_of_values()), value=anything | st.sampled_from(VALUES) | st.sampled_from(EDGES))
def test_keywords_are_read_as_jsonschema_reads_them(schema: dict[str, Any], value: Any) -> None:
    """The keyword that gmemd says a value fails is the first one that jsonschema says it fails."""
    error = next(strict_validator(schema).iter_errors(value), None)
    assert failed(schema, value, {}) == ("" if error is None else error.validator)


@examples
@given(command=commands, data=st.data())
def test_qom_json_by_itself_accepts_the_same(command: str, data: st.DataObject) -> None:
    """A JSON Schema validator that knows nothing of QEMU accepts exactly what gmemd accepts."""
    arguments = data.draw(GENERATOR.arguments(command))
    _, sentence = outcome(SCHEMA.commands[command].check, arguments)
    assert whole_document_validator(command).is_valid(arguments) == (sentence is None)


@examples
@given(name=st.sampled_from(sorted(SCHEMA.properties("memory-backend-memfd"))), value=anything)
def test_one_property_is_checked_as_in_object_add(name: str, value: object) -> None:
    """qom-set refuses a value in the words in which object-add refuses it."""
    qom_type = "memory-backend-memfd"
    others = {"qom-type": qom_type, "id": "m0", "size": 4096}
    normalized, sentence = outcome(SCHEMA.check_property, qom_type, name, value)
    if name == "qom-type":
        return
    completed, refusal = outcome(SCHEMA.check_object, {**others, name: value})
    assert refusal == sentence
    assert refusal or completed[name] == normalized
