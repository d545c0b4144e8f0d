"""gmemd's own schema: complete, documented, and what is derived from it current."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest

from gmemd.qapi.__main__ import HERE, main, stale
from gmemd.qapi.document import default_value
from gmemd.qapi.entities import MISSING, Array, Command, Definition, Enum, Event, Object
from gmemd.qapi.load import load
from gmemd.schema.validate import Schema

ENTITIES = load(HERE / "qapi")
SCHEMA = Schema.load()
DEFINITIONS = {entity.name: entity for entity in ENTITIES.visited}
IMPLICIT = [kind for kind in ENTITIES.types.values() if isinstance(kind, Object) and kind.implicit]
OBJECTS = [entity for entity in DEFINITIONS.values() if isinstance(entity, Object)] + IMPLICIT


def test_derived_files_are_current() -> None:
    """qom.json and docs/reference.md say what the source says; python -m gmemd.qapi --write makes them."""
    assert stale() == []
    assert main(["--check"]) == 0


def test_stale_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """--check says which file is stale, --write brings it up to date."""
    copy = tmp_path / "gmemd" / "schema"
    copy.mkdir(parents=True)
    monkeypatch.setattr("gmemd.qapi.__main__.HERE", copy)
    (copy / "qapi").symlink_to(HERE / "qapi")
    (copy / "qom.json").write_text("{}")
    assert main(["--check"]) == 1
    assert "qom.json is stale" in capsys.readouterr().err
    assert main(["--write"]) == 0
    assert main(["--check"]) == 0
    assert (copy / "qom.json").read_text() == (HERE / "qom.json").read_text()


@pytest.mark.parametrize("entity", DEFINITIONS.values(), ids=list(DEFINITIONS))
def test_everything_is_documented(entity: Definition) -> None:
    """Every definition says what it is and since when; the compiler holds the same for members."""
    assert entity.doc is not None
    assert entity.doc.summary
    assert "Since" in entity.doc.sections


def test_every_member_and_value_is_documented() -> None:
    """No member of an object and no value of an enum is without its text."""
    bare = [f"{owner.name}.{member.name}" for owner in OBJECTS for member in owner.members if not member.doc]
    enums = [entity for entity in DEFINITIONS.values() if isinstance(entity, Enum)]
    bare += [f"{enum.name}.{value.name}" for enum in enums for value in enum.values if not value.doc]
    assert bare == []


def test_every_command_with_a_result_says_what() -> None:
    """A command that returns something has a Returns section."""
    commands = ENTITIES.commands.values()
    assert [c.name for c in commands if c.returns and c.doc and "Returns" not in c.doc.sections] == []


def test_every_default_validates() -> None:
    """A default, also one that a union branch replaces, is a right value, and its member is optional."""
    for owner in OBJECTS:
        for member in owner.members:
            if member.default is not MISSING:
                assert member.optional, member.name
                check_default(member.type, member.default)
        for branch in owner.branches:
            added = ENTITIES.types[branch.type]
            assert isinstance(added, Object)
            members = {member.name: member for member in ENTITIES.members(added)}
            for name, value in branch.defaults.items():
                check_default(members[name].type, value)


def check_default(reference: str, written: Any) -> None:
    """Check one default against the JSON Schema of its type."""
    kind = ENTITIES.type(reference)
    key = reference if reference in SCHEMA.document["$defs"] else None
    value = default_value(ENTITIES, reference, written)
    if key:
        schema: dict[str, Any] = {"$ref": f"#/$defs/{key}", "$defs": SCHEMA.document["$defs"]}
    else:
        element = kind.element if isinstance(kind, Array) else reference
        found = [m for o in SCHEMA.document["$defs"].values() for m in o.get("properties", {}).values()]
        wanted = f"[{element}]" if isinstance(kind, Array) else element
        schema = next(member for member in found if member.get("x-qapi") == wanted)
    jsonschema.Draft202012Validator(schema).validate(value)


def test_every_default_of_an_object_type_passes_its_own_check() -> None:
    """What check_object fills in, object-add would have taken from the client."""
    for qom_type in SCHEMA.object_types:
        needed = {"size": 4096, "mem-path": "/dev/null"}
        declared = SCHEMA.properties(qom_type)
        given = {"qom-type": qom_type, "id": "m0", **{name: needed[name] for name in needed if name in declared}}
        completed = SCHEMA.check_object(given)
        assert SCHEMA.check_object(completed) == completed


def test_commands_of_the_slice() -> None:
    """The schema has the commands that gmemd promises."""
    promised = """qmp_capabilities query-version query-commands query-qmp-schema query-status query-name query-uuid
        query-kvm yank query-yank quit object-add object-del qom-list qom-get qom-set qom-list-types
        qom-list-properties qom-list-get query-memdev query-memory-size-summary getfd closefd add-fd remove-fd
        query-fdsets device-list-properties memdev-get-fd query-memdev-status"""
    assert set(promised.split()) <= set(SCHEMA.commands)
    assert list(Schema.load(lab=True).commands) == list(ENTITIES.commands)
    assert [name for name, command in SCHEMA.commands.items() if command.allow_oob] == ["yank", "query-yank"]


def test_object_types() -> None:
    """ObjectType, the union's branches and the types gmemd makes are the same list."""
    union, enum = ENTITIES.types["ObjectOptions"], ENTITIES.types["ObjectType"]
    assert isinstance(union, Object)
    assert isinstance(enum, Enum)
    assert [branch.name for branch in union.branches] == [value.name for value in enum.values]
    assert tuple(value.name for value in enum.values) == SCHEMA.object_types
    assert set(SCHEMA.object_types) == {
        *(f"memory-backend-{kind}" for kind in ("file", "guest-memfd", "memfd", "ram", "shm")), "thread-context"
    }


@pytest.mark.parametrize(("qom_type", "share"), [("ram", False), ("file", False), ("memfd", True), ("shm", True)])
def test_share_differs_by_type(qom_type: str, share: bool) -> None:
    """A union branch may replace a default of the base struct."""
    assert SCHEMA.properties(f"memory-backend-{qom_type}")["share"].default is share


def test_properties_tell_what_qom_shows() -> None:
    """A Property has the QAPI type, the QOM type, default, features and description."""
    properties = SCHEMA.properties("memory-backend-memfd")
    assert list(properties)[:3] == ["qom-type", "id", "dump"]
    assert [p.qom_type for p in properties.values()][2:7] == ["bool", "int", "bool", "HostMemPolicy", "bool"]
    guest_memfd = properties["guest-memfd"]
    assert (guest_memfd.type, guest_memfd.default, guest_memfd.features) == ("OnOffAuto", "auto", ("unstable",))
    assert properties["size"].required
    assert properties["size"].default is None
    assert properties["size"].description == "Size of the memory region (ex: 500M)"
    assert properties["prealloc-context"].qom_type == "link<thread-context>"
    assert properties["hugetlbsize"].default is None  # QEMU tells 0 given from nothing given
    assert SCHEMA.properties("memory-backend-file")["mem-path"].qom_type == "string"


def test_qom_json_is_a_json_schema() -> None:
    """The document is right by its own dialect."""
    jsonschema.Draft202012Validator.check_schema(SCHEMA.document)


@pytest.mark.parametrize(
    ("message", "right"),
    [
        ({"execute": "query-version"}, True),
        ({"execute": "query-version", "arguments": {}, "id": [1]}, True),
        ({"execute": "query-version", "arguments": {"x": 1}}, True),  # only the arguments' own schema says no
        ({"execute": "nope"}, False),
        ({"execute": "object-del"}, False),
        ({"execute": "object-del", "arguments": {"id": "m0"}}, True),
        ({"execute": "object-del", "arguments": {"id": 5}}, False),
        (
            {"execute": "object-add", "arguments": {"qom-type": "memory-backend-ram", "id": "m0", "size": 4096}},
            True,
        ),
        ({"execute": "object-add", "arguments": {"qom-type": "memory-backend-ram", "id": "m0"}}, False),
        ({"arguments": {}}, False),
    ],
)
def test_the_document_describes_a_command_message(message: dict[str, Any], right: bool) -> None:
    """Anybody can check a whole command against qom.json."""
    assert jsonschema.Draft202012Validator(SCHEMA.document).is_valid(message) is right


def test_reference_page_names_everything() -> None:
    """docs/reference.md has a heading for every command, event and type."""
    page = (HERE.parent.parent / "docs" / "reference.md").read_text()
    for entity in DEFINITIONS.values():
        if isinstance(entity, Command | Event):
            assert f"### {type(entity).__name__} `{entity.name}`" in page
        else:
            assert f" `{entity.name}`\n" in page
