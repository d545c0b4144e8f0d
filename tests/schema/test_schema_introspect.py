"""query-qmp-schema: encoded as QEMU encodes it, and equal to what QEMU answered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gmemd.qapi.introspect import holds, introspect
from gmemd.qapi.load import load
from gmemd.schema.validate import Schema
from tests.conformance.schema_slice import schema_slice

CORPUS = Path(__file__).parent.parent / "conformance"
ANSWER = Schema.load().introspection()
ENTRIES = {entry["name"]: entry for entry in ANSWER}


def recorded() -> Iterator[tuple[str, Any]]:
    """Descriptions of commands and events as QEMU 11.1 gave them, by name."""
    for line in (CORPUS / "qmp-11.1.jsonl").read_text().splitlines():
        for step in json.loads(line).get("steps", ()):
            for norm in step.get("norm", ()):
                if norm.startswith("schema:"):
                    yield norm.removeprefix("schema:"), step["recv"][0]


RECORDED = dict(recorded())


def unordered(description: Any) -> Any:
    """The same with members and values sorted: their order does not matter in a recorded description."""
    if isinstance(description, list):
        return sorted((unordered(item) for item in description), key=json.dumps)
    if isinstance(description, dict):
        return {key: unordered(description[key]) for key in sorted(description)}
    return description


@pytest.mark.parametrize("name", RECORDED)
def test_equal_to_recorded(name: str) -> None:
    """Each description recorded from QEMU comes out the same, guest-memfd of 11.2 apart."""
    assert unordered(schema_slice(ANSWER, name)) == unordered(RECORDED[name])


def object_add_members(qom_type: str) -> list[dict[str, Any]]:
    arg = ENTRIES[ENTRIES["object-add"]["arg-type"]]
    (variant,) = (variant["type"] for variant in arg["variants"] if variant["case"] == qom_type)
    members: list[dict[str, Any]] = ENTRIES[variant]["members"]
    return members


MEMFD_MEMBERS = """dump host-nodes merge policy prealloc prealloc-threads prealloc-context share reserve size
    x-use-canonical-path-for-ramblock-id hugetlb hugetlbsize seal guest-memfd"""


def test_object_add() -> None:
    """object-add is an object with a tag; variants have the base's members first, in QEMU's order."""
    arg = ENTRIES[ENTRIES["object-add"]["arg-type"]]
    assert [member["name"] for member in arg["members"]] == ["qom-type", "id"]
    assert arg["tag"] == "qom-type"
    members = object_add_members("memory-backend-memfd")
    assert [member["name"] for member in members] == MEMFD_MEMBERS.split()
    assert [member["name"] for member in members if "default" not in member] == ["size"]
    assert members[-1]["features"] == ["unstable"]
    assert members[-1]["default"] is None
    assert ENTRIES[members[-1]["type"]]["values"] == ["auto", "on", "off"]
    own = [member["name"] for member in object_add_members("memory-backend-file")][11:]
    assert own == ["align", "offset", "discard-data", "mem-path", "pmem", "readonly", "rom"]


def test_names_are_masked() -> None:
    """Types are numbered by first use; commands, events and builtins keep their names; integers are int."""
    assert ANSWER[0]["name"] == "query-status"
    assert ENTRIES["query-status"]["arg-type"] == "0"
    assert ENTRIES["query-status"]["ret-type"] == "1"
    assert ENTRIES["quit"]["ret-type"] == "0"
    assert ENTRIES["0"] == {"name": "0", "meta-type": "object", "members": []}
    kinds = [entry["meta-type"] in ("command", "event") for entry in ANSWER]
    assert kinds == sorted(kinds, reverse=True)  # commands and events first
    assert {entry["name"] for entry in ANSWER if entry["meta-type"] == "builtin"} == {"str", "int", "bool", "any"}
    assert ENTRIES["[int]"] == {"name": "[int]", "meta-type": "array", "element-type": "int"}
    assert all(name.isdigit() for name, entry in ENTRIES.items() if entry["meta-type"] == "enum")


def test_every_type_named_is_described() -> None:
    """Whatever an entry refers to has an entry, and arg-type is an object."""
    for entry in ANSWER:
        named = [entry[key] for key in ("arg-type", "ret-type", "element-type") if key in entry]
        named += [member["type"] for member in entry.get("members", ()) if "type" in member]
        named += [variant["type"] for variant in entry.get("variants", ())]
        assert [name for name in named if name not in ENTRIES] == []
        if "arg-type" in entry:
            assert ENTRIES[entry["arg-type"]]["meta-type"] == "object"


def test_unmasked_names(tmp_path: Path) -> None:
    """Without masking types keep their names."""
    (tmp_path / "s.json").write_text("{ 'enum': 'Ee', 'data': [ 'a' ] } { 'event': 'EV', 'data': { 'e': 'Ee' } }")
    answer = introspect(load(tmp_path / "s.json"), mask=False)
    assert [entry["name"] for entry in answer] == ["EV", "q_obj_EV-arg", "Ee"]


CONDITIONAL = """
{ 'enum': 'Ee', 'data': [ 'a', { 'name': 'b', 'if': 'B' } ] }
{ 'struct': 'Aa', 'data': { '*x': { 'type': 'Ee', 'if': 'X', 'features': [ { 'name': 'f', 'if': 'F' }, 'g' ] } } }
{ 'union': 'Uu', 'base': { 'e': 'Ee' }, 'discriminator': 'e',
  'data': { 'a': 'Aa', 'b': { 'type': 'Aa', 'if': 'B' } } }
{ 'alternate': 'Al', 'data': { 'n': 'null', 'a': { 'type': 'Aa', 'if': 'X' } } }
{ 'command': 'gone', 'if': 'GONE', 'returns': 'Aa' }
{ 'command': 'c', 'data': 'Uu', 'boxed': true }
{ 'event': 'EV', 'data': { 'al': 'Al' } }
"""


@pytest.mark.parametrize(
    ("defined", "left"),
    [
        ({"B", "X", "F", "GONE"}, (["gone", "c", "EV"], ["a", "b"], ["x"], ["f", "g"], 2, 2)),
        ({"X"}, (["c", "EV"], ["a"], ["x"], ["g"], 1, 2)),
        (set(), (["c", "EV"], ["a"], [], None, 1, 1)),
    ],
    ids=["all", "some", "none"],
)
def test_conditional_parts(tmp_path: Path, defined: set[str], left: Any) -> None:
    """Parts whose condition does not hold are left out, but they count in the numbering."""
    (tmp_path / "s.json").write_text(CONDITIONAL)
    entities = load(tmp_path / "s.json")
    answer = introspect(entities, config=defined.__contains__)
    by_meta = {entry["meta-type"]: entry for entry in answer}
    struct = next(entry for entry in answer if entry["meta-type"] == "object" and entry["name"] == "1")
    union = next(entry for entry in answer if "tag" in entry)
    commands, values, members, features, variants, alternatives = left
    assert [entry["name"] for entry in answer if entry["meta-type"] in ("command", "event")] == commands
    assert by_meta["enum"]["values"] == values
    assert [member["name"] for member in struct["members"]] == members
    assert features is None or struct["members"][0]["features"] == features
    assert len(union["variants"]) == variants
    assert len(by_meta["alternate"]["members"]) == alternatives
    assert {entry["name"] for entry in answer} <= {entry["name"] for entry in introspect(entities)}


def test_conditions() -> None:
    """all, any and not nest."""
    condition = {"all": ["A", {"any": ["B", {"not": "C"}]}]}
    assert holds(condition, {"A"}.__contains__)
    assert holds(condition, {"A", "B", "C"}.__contains__)
    assert not holds(condition, {"A", "C"}.__contains__)
    assert not holds(condition, {"B"}.__contains__)
