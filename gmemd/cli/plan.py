"""What is to be done so that the objects of a file exist as they are described there: `Step`s of one transaction."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from gmemd.cli import render
from gmemd.cli.connection import Connection, short_type
from gmemd.cli.wanted import Wanted
from gmemd.kernel.affinity import cpus_of, online_cpus
from gmemd.schema.sizes import parse_size
from gmemd.schema.validate import Schema

# Properties that have an effect when they are changed later. QEMU's qom-set takes some more, such as hugetlb, which
# then say what the memory is not.
LIVE = frozenset(("merge", "dump", "prealloc", "prealloc-context", "prealloc-threads", "discard-data",
                  "cpu-affinity", "node-affinity"))
WORDS = {"+": "create", "~": "change", "-": "delete"}
State = dict[str, Any]  # of an object: its properties, with "type", by name


class Step(NamedTuple):
    """One action, or why there is none."""

    sign: str  # a key of WORDS
    id: str
    qom_type: str
    what: str  # for people
    command: str
    arguments: dict[str, Any]
    refused: str = ""  # a sentence

    @property
    def action(self) -> dict[str, Any]:
        return {"type": self.command, "data": self.arguments}

    def told(self) -> dict[str, Any]:
        """For programs."""
        return {"id": self.id, "qom-type": self.qom_type, "change": WORDS[self.sign], "command": self.command,
                "arguments": self.arguments, **({"refused": self.refused} if self.refused else {})}


def plan(connection: Connection, wanted: Wanted, *, prune: bool) -> list[Step]:
    """The steps in their order: objects, clones, deletions."""
    listed = connection.execute("qom-list", {"path": "/objects"})
    types = {entry["name"]: entry["type"][len("child<"):-1] for entry in listed if entry["type"].startswith("child<")}
    here = [one["id"] for one in wanted.objects if one["id"] in types]
    found = connection.execute("qom-list-get", {"paths": [f"/objects/{name}" for name in here]}) if here else []
    states = {name: {entry["name"]: entry["value"] for entry in one["properties"] if "value" in entry}
              for name, one in zip(here, found, strict=True)}
    statuses = connection.statuses() if prune or wanted.clones else []
    steps = [step for one in wanted.objects
             for step in (_changes(one, types[one["id"]], states[one["id"]]) if one["id"] in states else [_new(one)])]
    steps += [step for one in wanted.clones for step in _clone(one, types, statuses)]
    return steps + (_deletions(wanted, statuses) if prune else [])


def _new(one: dict[str, Any]) -> Step:
    what = " ".join(f"{name}={_shown(name, value)}" for name, value in one.items() if name not in ("id", "qom-type"))
    return Step("+", one["id"], one["qom-type"], what, "object-add", one)


def _shown(name: str, value: Any) -> str:
    """A value as in --object; a size in a unit, if that is exact."""
    if type(value) is bool:
        return "on" if value else "off"
    if isinstance(value, list):
        return ",".join(map(str, value))
    text = render.cell(name, value).replace(" ", "")
    return text if name not in render.BYTES or parse_size(text.removesuffix("iB").removesuffix("B")) == value else \
        str(value)


# -- what is there already ---------------------------------------------------------------------------

def _changes(one: dict[str, Any], qom_type: str, state: State) -> Iterator[Step]:
    """Steps for the properties that the file names and that are otherwise."""
    object_id = one["id"]
    if one["qom-type"] != qom_type:
        yield Step("~", object_id, qom_type, f"type: {short_type(qom_type)} -> {short_type(one['qom-type'])}", "", {},
                   f"object '{object_id}' is a {qom_type}, and cannot become a {one['qom-type']}")
        return
    for name, value in one.items():
        if name in ("id", "qom-type"):
            continue
        before = _current(qom_type, name, state)
        if _comparable(name, value) == _comparable(name, before):
            continue
        is_cpus = name == "node-affinity"
        what = name + ": " + ("" if is_cpus else f"{_shown(name, before)} -> ") + _shown(name, value)
        refused = "" if name in LIVE else (f"property '{name}' of object '{object_id}' is {_shown(name, before)}, and "
                                           f"cannot be changed to {_shown(name, value)}")
        yield Step("~", object_id, qom_type, what, "qom-set",
                   {"path": f"/objects/{object_id}", "property": name, "value": value}, refused)


def _current(qom_type: str, name: str, state: State) -> Any:
    """A property as it is; what cannot be seen has its default."""
    if name == "node-affinity":
        return state["cpu-affinity"]
    if name in state:
        return state[name]
    return Schema.load().properties(qom_type)[name].default


def _comparable(name: str, value: Any) -> Any:
    """A value in the one form that it has however it is written."""
    if name == "prealloc-context":
        return (value or "").removeprefix("/objects/")
    if name == "node-affinity":
        return sorted(cpus_of(value))
    if name == "cpu-affinity":
        return sorted(online_cpus().intersection(value))
    return sorted(set(value)) if isinstance(value, list) else value


def _clone(one: dict[str, Any], types: dict[str, str], statuses: list[dict[str, Any]]) -> Iterator[Step]:
    object_id, template = one["id"], one["template"]
    if object_id not in types:
        what = f"copy of {template}" if one["copy"] else f"clone of {template}"
        qom_type = types.get(template, "") if one["copy"] else "memory-backend-memfd"
        yield Step("+", object_id, qom_type, what, "memdev-clone", one)
        return
    is_of = next((status.get("template") for status in statuses if status["id"] == object_id), None)
    if not one["copy"] and is_of != template:
        yield Step("~", object_id, types[object_id], f"clone of {template}", "", {},
                   f"object '{object_id}' exists, and is " + (f"a clone of '{is_of}'" if is_of else "no clone") +
                   f", not one of '{template}'")


# -- what is too much --------------------------------------------------------------------------------

def _deletions(wanted: Wanted, statuses: list[dict[str, Any]]) -> list[Step]:
    """Steps for memory of our user that the file does not name; templates last, and not while clones stay."""
    named = wanted.named
    named |= {status["template"] for status in statuses if status["id"] in named and "template" in status}
    surplus = [status for status in statuses if status["id"] not in named
               and status.get("owner", {}).get("uid") == os.getuid()]
    templates = {status["template"] for status in surplus if "template" in status}
    return [Step("-", status["id"], status["qom-type"], render.size(status["size"]), "object-del",
                 {"id": status["id"]})
            for status in sorted(surplus, key=lambda status: (status["id"] in templates, status["id"]))]
