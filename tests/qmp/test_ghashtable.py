"""The order of GLib's hash table, against what QEMU listed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmemd.qmp.encode import member_order
from gmemd.qmp.ghashtable import GHashSet, first_unexpected
from tests.conformance.cases import load

# object-add's members for memory-backend-file in QEMU 7.2, in schema order
DECLARED = (
    *("qom-type", "id", "dump", "host-nodes", "merge", "policy", "prealloc", "prealloc-threads", "prealloc-context"),
    *("share", "reserve", "size", "x-use-canonical-path-for-ramblock-id"),
    *("align", "discard-data", "mem-path", "pmem", "readonly"),
)
MANDATORY = ("qom-type", "id", "size", "mem-path")


def names(prefix: str, *numbers: int) -> list[str]:
    return [f"{prefix}{number}" for number in numbers]


# The container /objects


def listings(case: dict[str, Any]) -> tuple[list[list[str]], list[list[str]]]:
    """What QEMU listed in a case at each qom-list of /objects, and what a GHashSet makes of it."""
    recorded, ours = [], []
    slots = GHashSet(["compat_monitor0"])
    for step in case["steps"]:
        request, reply = json.loads(step["text"]), json.loads(step["recv"][0])
        arguments = request.get("arguments", {})
        if request["execute"] == "object-add":
            slots.add(arguments["id"])
        if request["execute"] == "object-del" or (request["execute"] == "object-add" and "error" in reply):
            slots.discard(arguments["id"], rebuild=False)
        if request["execute"] == "qom-list":
            recorded.append([row["name"] for row in reply["return"][1:]])
            ours.append(list(reversed(list(slots))))
    return recorded, ours


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case["case"])
        for case in load("qmp-11.1.jsonl")
        if case["case"].startswith("order-objects/")
    ],
)
def test_objects_are_listed_as_recorded(case: dict[str, Any]) -> None:
    """/objects is listed in reverse slot order; an id leaves a tombstone, also one whose object failed."""
    recorded, ours = listings(case)
    assert recorded
    assert recorded == ours


def test_tombstones_stay_and_are_filled_again() -> None:
    """Growing, deleting without rebuilding and filling the gaps give the order QEMU 7.2 listed."""
    slots = GHashSet(names("m", *range(30)))
    for name in names("m", *range(0, 30, 2)):
        slots.discard(name, rebuild=False)
    for name in names("m", *range(30, 37)):
        slots.add(name)
    for name in names("m", *range(1, 30, 4)):
        slots.discard(name, rebuild=False)
    slots.add("m0")
    listed = names("m", 33, 11, 0, 35, 27, 19, 32, 31, 23, 34, 7, 15, 36, 30, 3)
    assert listed == list(reversed(list(slots)))


# Unexpected arguments


@pytest.mark.parametrize(
    ("given_names", "named"),
    [
        ([*MANDATORY, "foo", "bar"], "bar"),
        (["foo", "bar", *MANDATORY], "bar"),
        ([*MANDATORY, *names("n", 0, 1, 2)], "n0"),
        ([*MANDATORY, *names("n", *range(9))], "n4"),
        ([*MANDATORY, *names("n", *range(10, 25))], "n10"),
        ([*MANDATORY, *names("n", *range(40))], "n39"),
        ([*DECLARED, *names("n", *range(200))], "n54"),
        ([*MANDATORY, "Size", "SIZE", "id ", "size "], "Size"),
        # striking out so many shrinks the table on the way, and what is left changes its order
        ([*DECLARED, "a", "b"], "b"),
        ([*DECLARED, "zeta", "alpha", "beta"], "beta"),
        ([*DECLARED, "x", "xx", "xxx"], "xx"),
        ([*DECLARED, *names("n", 1, 2)], "n2"),
        ([*DECLARED, *names("k", 278, 66)], "k66"),
        # which also depends on what is struck out first
        ([*DECLARED, *names("k", 222, 49, 52, 164)], "k164"),
        ([*DECLARED, *names("k", 68, 41, 17, 40)], "k41"),
        ([*DECLARED, *names("k", 25, 138, 109)], "k138"),
        # bytes are signed, NUL is C0 80, and there is an empty name
        ([*DECLARED, "é", "€", "x\0y", "\0", ""], ""),
        (list(DECLARED), None),
        ([], None),
    ],
)
def test_the_unexpected_argument_is_the_one_qemu_named(given_names: list[str], named: str | None) -> None:
    """Of several unexpected arguments that is named which QEMU 7.2 named."""
    assert named == first_unexpected(member_order(given_names), DECLARED)


# A set


@given(st.lists(st.tuples(st.sampled_from("+-x"), st.sampled_from(names("m", *range(60)))), max_size=200))
@settings(max_examples=100, deadline=None, derandomize=True, database=None)
def test_it_is_a_set(steps: list[tuple[str, str]]) -> None:
    """Whatever is added and discarded, with and without rebuilding: the members are those of a set."""
    ours, model = GHashSet(), set[str]()
    for step, name in steps:
        if step == "+":
            ours.add(name)
            model.add(name)
        else:
            ours.discard(name, rebuild=step == "x")
            model.discard(name)
        assert (name in model) == (name in ours)
    assert sorted(model) == sorted(ours)
    assert len(model) == len(ours)
    assert len(model) == len(list(ours))
    assert model == {name for name in names("m", *range(60)) if name in ours}
