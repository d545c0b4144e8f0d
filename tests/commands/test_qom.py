"""The QOM tree: listing, reading and writing properties of live objects."""

from __future__ import annotations

from typing import Any

import pytest

from tests.commands.conftest import Machine


@pytest.fixture
def objects(machine: Machine) -> Machine:
    for number in range(3):
        machine.run("object-add", qom_type="memory-backend-memfd", id=f"m{number}", size=8192)
    return machine


def test_every_listed_property_can_be_read(objects: Machine) -> None:
    """Walking the whole tree by qom-list and qom-get never fails, and qom-list-get agrees."""
    paths, seen = ["/"], 0
    while paths:
        path = paths.pop()
        rows = objects.run("qom-list", path=path)
        values = [objects.run("qom-get", path=path, property=row["name"]) for row in rows]
        paths += [value for row, value in zip(rows, values, strict=True) if row["type"].startswith("child<")]
        [entry] = objects.run("qom-list-get", paths=[path])
        assert [row["value"] for row in entry["properties"]] == values
        seen += 1
    assert seen == 2 + 3 * 2


@pytest.mark.parametrize("path", ["/objects/m1", "objects/m1", "m1", "//objects//m1/"])
def test_paths_of_an_object(objects: Machine, path: str) -> None:
    """Absolute, partial, with doubled and trailing slashes."""
    assert objects.run("qom-get", path=path, property="size") == 8192


@pytest.mark.parametrize("path", ["/m1", "m3", "/objects/..", ".", "/objects/m1/size", "m1/m2"])
def test_paths_of_nothing(objects: Machine, path: str) -> None:
    """What is not an object, child or link is not found."""
    assert objects.refusal("qom-list", path=path) == ("DeviceNotFound", f"Device '{path}' not found")


@pytest.mark.parametrize("path", ["", "objects", "objects/"])
def test_what_several_places_match(objects: Machine, path: str) -> None:
    """Only commands that list say that a path is ambiguous; to others the object does not exist."""
    objects.run("object-add", qom_type="memory-backend-ram", id="objects", size=8192)
    ambiguous = ("GenericError", f"Path '{path}' is ambiguous")
    missing = ("DeviceNotFound", f"Device '{path}' not found")
    assert objects.refusal("qom-list", path=path) == ambiguous
    assert objects.refusal("qom-list-get", paths=[path]) == ambiguous
    assert objects.refusal("qom-list-get", paths=[path] * 9) == ambiguous
    assert objects.refusal("qom-get", path=path, property="type") == missing
    assert objects.refusal("qom-set", path=path, property="type", value=1) == missing
    assert objects.run("qom-get", path="objects/objects", property="type") == "memory-backend-ram"


def test_properties_of_an_abstract_type_are_those_that_all_have(objects: Machine) -> None:
    """memory-backend has what every one of its types has, described alike."""
    rows = {name: objects.run("qom-list-properties", typename=f"memory-backend{name}")
            for name in ("", "-ram", "-memfd", "-file", "-shm", "-guest-memfd")}
    assert len(rows[""]) == 12
    for row in rows[""]:
        assert all(row in others for others in rows.values())


@pytest.mark.parametrize(("name", "value", "desc"), [
    ("size", "any", "cannot change property size of memory-backend-memfd "),
    ("share", True, "cannot change property value"),
    ("share", 1, "Invalid parameter type for 'share', expected: boolean"),
    ("hugetlbsize", "any", "cannot change property value"),
    ("type", "x", "Property 'memory-backend-memfd.type' is not writable"),
    ("m0[0]", "x", "Property 'memory-backend-memfd.m0[0]' is not writable"),
    ("nothing", 1, "Property 'memory-backend-memfd.nothing' not found"),
    ("policy", "no", "Parameter 'policy' does not accept value 'no'"),
    ("prealloc-threads", 0, "property 'prealloc-threads' of memory-backend-memfd doesn't take value '0'"),
    ("host-nodes", [128], "Invalid host-nodes value: 128"),
])
def test_refused_writes(objects: Machine, name: str, value: Any, desc: str) -> None:
    """A live object keeps what makes it what it is."""
    assert objects.refusal("qom-set", path="m0", property=name, value=value) == ("GenericError", desc)


@pytest.mark.parametrize(("name", "value", "read"), [
    ("merge", False, False), ("dump", False, False), ("policy", "bind", "bind"), ("host-nodes", [1, 0, 1], [0, 1]),
    ("prealloc-threads", 4, 4), ("seal", False, False), ("guest-memfd", "on", "on"), ("prealloc", True, True),
    ("prealloc-context", "", ""),
])
def test_accepted_writes(objects: Machine, name: str, value: Any, read: Any) -> None:
    """What may change is stored, and shows in qom-get."""
    assert objects.run("qom-set", path="m0", property=name, value=value) == {}
    assert objects.run("qom-get", path="m0", property=name) == read


def test_host_nodes_are_added(objects: Machine) -> None:
    """Setting host-nodes adds to those that there are; what is refused adds none."""
    for value, read in ([3, 5], [3, 5]), ([0], [0, 3, 5]), ([], [0, 3, 5]), ([127], [0, 3, 5, 127]):
        assert objects.run("qom-set", path="m0", property="host-nodes", value=value) == {}
        assert objects.run("qom-get", path="m0", property="host-nodes") == read
    assert objects.refusal("qom-set", path="m0", property="host-nodes", value=[7, 128])
    assert objects.run("qom-get", path="m0", property="host-nodes") == [0, 3, 5, 127]


def test_prealloc_cannot_be_taken_back(objects: Machine) -> None:
    """Once true, prealloc stays true."""
    objects.run("qom-set", path="m0", property="prealloc", value=True)
    assert objects.run("qom-set", path="m0", property="prealloc", value=False) == {}
    assert objects.run("qom-get", path="m0", property="prealloc") is True


def test_types(machine: Machine) -> None:
    """Types know their parent; interfaces and unknown ones are refused."""
    assert machine.run("qom-list-types", implements="memory-backend-ram", abstract=True) == [
        {"name": "memory-backend-ram", "parent": "memory-backend"}]
    assert machine.run("qom-list-types", implements="nope") == []
    assert {row["name"] for row in machine.run("qom-list-types", implements="user-creatable")} >= {
        "memory-backend-memfd"}
    assert machine.refusal("qom-list-properties", typename="nope") == ("DeviceNotFound", "Class 'nope' not found")
    assert machine.refusal("qom-list-properties", typename="user-creatable") == (
        "GenericError", "Parameter 'typename' expects a QOM type")
    assert machine.refusal("device-list-properties", typename="pc-dimm") == (
        "DeviceNotFound", "Device 'pc-dimm' not found")
