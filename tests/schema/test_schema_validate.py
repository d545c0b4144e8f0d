"""Arguments: what is accepted, how it is completed, and QEMU's sentence for the rest."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from gmemd.errors import COMMAND_NOT_FOUND, QmpError
from gmemd.qmp.stream import Stream
from gmemd.schema.validate import Command, Schema
from tests.conformance.cases import RECORDED, replayed

SCHEMA = Schema.load()
REJECTING = Schema.load(unstable_input="reject")
MEMFD = {"qom-type": "memory-backend-memfd", "id": "m0", "size": 4096}


def refusal(command: str, arguments: dict[str, Any], schema: Schema = SCHEMA) -> str | None:
    """The sentence that answers these arguments; None if they are accepted."""
    try:
        schema.commands[command].check(arguments)
    except QmpError as error:
        return error.desc
    return None


# A sentence that only argument checking can answer; `expects` has others in the commands themselves.
OF_CHECKING = re.compile(
    r"Parameter '.*' (is missing|is unexpected|does not accept value .*|expects u?int\d+(_t)?)"
    r"|Invalid parameter type for .*, expected: (string|boolean|integer|array|object)"
    r"|Unstable parameter .* disabled by policy"
)


def recorded() -> Iterator[tuple[str, str, str, str]]:
    """(case, set-up, line sent, line received) of every recorded command with arguments.

    In the place of the cases in which gmemd differs on purpose stand its own.
    """
    for case in (case for corpus in RECORDED for case in replayed(corpus)):
        for step in case["steps"]:
            received = step.get("recv") or [""]
            if "arguments" in step.get("text", "") and len(received) == 1 and isinstance(received[0], str):
                yield case["case"], case["setup"], step["text"], received[0]


def test_recorded_cases() -> None:
    """Every command with arguments that was recorded is accepted or refused as QEMU did."""
    checked = 0
    for case, setup, sent, received in recorded():
        stream = Stream()
        stream.feed(sent.encode())
        message = stream.next()
        if not isinstance(message, dict):
            continue
        name, arguments = message.get("execute"), message.get("arguments")
        if not isinstance(name, str) or name not in SCHEMA.commands or not isinstance(arguments, dict):
            continue
        checked += 1
        desc = _desc(received)
        mine = refusal(name, arguments, REJECTING if setup == "unstable-reject" else SCHEMA)
        if name == "qom-set" and mine is None:
            continue  # the value is checked later, by check_property
        expected = desc if desc is not None and OF_CHECKING.fullmatch(desc) else None
        assert (case, sent, mine) == (case, sent, expected)
    assert checked > 1000


def _desc(received: str) -> str | None:
    try:
        desc = json.loads(received).get("error", {}).get("desc")
    except ValueError:
        return None
    return desc if isinstance(desc, str) and "negotiation" not in desc else None


@pytest.mark.parametrize(
    ("command", "arguments", "sentence"),
    [
        ("qom-list", {}, "Parameter 'path' is missing"),
        ("qom-list", {"path": None}, "Invalid parameter type for 'path', expected: string"),
        ("qom-list", {"path": "/", "x": 1}, "Parameter 'x' is unexpected"),
        ("qom-list", {"path": "/", "foo": 1, "bar": 2}, "Parameter 'bar' is unexpected"),
        ("query-name", {"a": 1}, "Parameter 'a' is unexpected"),
        ("qom-list-types", {"abstract": 0}, "Invalid parameter type for 'abstract', expected: boolean"),
        ("remove-fd", {"fdset-id": 1.0}, "Invalid parameter type for 'fdset-id', expected: integer"),
        ("remove-fd", {"fdset-id": 2**63}, "Invalid parameter type for 'fdset-id', expected: integer"),
        ("qmp_capabilities", {"enable": "oob"}, "Invalid parameter type for 'enable', expected: array"),
        ("qmp_capabilities", {"enable": ["x"]}, "Parameter 'null' does not accept value 'x'"),
        ("qmp_capabilities", {"enable": [1]}, "Invalid parameter type for 'enable[0]', expected: string"),
        ("qom-set", {"path": "/", "property": "x"}, "Parameter 'value' is missing"),
        ("yank", {"instances": [1]}, "Invalid parameter type for 'instances[0]', expected: object"),
        ("yank", {"instances": [{}]}, "Parameter 'instances[0].type' is missing"),
        ("yank", {"instances": [{"type": "x"}]}, "Parameter 'type' does not accept value 'x'"),
        ("yank", {"instances": [{"type": "chardev"}]}, "Parameter 'instances[0].id' is missing"),
        (
            "yank",
            {"instances": [{"type": "migration"}, {"type": "migration", "id": "c"}]},
            "Parameter 'instances[1].id' is unexpected",
        ),
        ("object-add", {}, "Parameter 'qom-type' is missing"),
        ("object-add", {"qom-type": 1}, "Invalid parameter type for 'qom-type', expected: string"),
        ("object-add", {"qom-type": "secret"}, "Parameter 'qom-type' does not accept value 'secret'"),
        ("object-add", {"qom-type": "memory-backend-ram"}, "Parameter 'id' is missing"),
        ("object-add", MEMFD | {"size": 1.0}, "Parameter 'size' expects uint64"),
        ("object-add", MEMFD | {"size": "1M"}, "Parameter 'size' expects uint64"),
        ("object-add", MEMFD | {"size": 2**64}, "Parameter 'size' expects uint64"),
        ("object-add", MEMFD | {"size": True}, "Parameter 'size' expects uint64"),
        ("object-add", MEMFD | {"prealloc-threads": -1}, "Parameter 'prealloc-threads' expects uint32_t"),
        ("object-add", MEMFD | {"prealloc-threads": None}, "Parameter 'prealloc-threads' expects uint64"),
        ("object-add", MEMFD | {"host-nodes": [0, 65536]}, "Parameter 'null' expects uint16_t"),
        ("object-add", MEMFD | {"host-nodes": [0, "x"]}, "Parameter 'host-nodes[1]' expects uint64"),
        ("object-add", MEMFD | {"policy": "x"}, "Parameter 'policy' does not accept value 'x'"),
        ("object-add", MEMFD | {"guest-memfd": 1}, "Invalid parameter type for 'guest-memfd', expected: string"),
        ("object-add", MEMFD | {"guest-memfd": "x"}, "Parameter 'guest-memfd' does not accept value 'x'"),
        ("object-add", MEMFD | {"mem-path": "/x"}, "Parameter 'mem-path' is unexpected"),
        ("object-add", MEMFD | {"pmem": True}, "Parameter 'pmem' is unexpected"),
        # of two faults the one earlier in the schema, unexpected last
        ("object-add", MEMFD | {"seal": 1, "size": "x"}, "Parameter 'size' expects uint64"),
        ("object-add", MEMFD | {"foo": 1, "seal": 1}, "Invalid parameter type for 'seal', expected: boolean"),
        ("object-add", {"foo": 1, "qom-type": "memory-backend-ram", "id": "a"}, "Parameter 'size' is missing"),
    ],
)
def test_sentences(command: str, arguments: dict[str, Any], sentence: str) -> None:
    """Wrong arguments are refused in QEMU's words; then the right ones are taken."""
    assert refusal(command, arguments) == sentence
    assert refusal("object-add", MEMFD) is None


def test_completed_arguments() -> None:
    """Defaults are filled in, the dict given stays as it was, members without a default stay absent."""
    given = dict(MEMFD)
    completed = SCHEMA.check_object(given)
    assert given == MEMFD
    assert completed == {
        **MEMFD,
        **{"dump": True, "host-nodes": [], "merge": True, "policy": "default", "prealloc": False},
        **{"prealloc-threads": 1, "prealloc-context": "", "share": True, "reserve": True},
        **{"x-use-canonical-path-for-ramblock-id": False, "hugetlb": False, "seal": True, "guest-memfd": "auto"},
    }
    assert SCHEMA.commands["query-version"].check({}) == {}
    assert SCHEMA.commands["qom-list-types"].check({}) == {}


@pytest.mark.parametrize("size", [-1, -(2**63), 0, 2**64 - 1])
def test_negative_sizes_wrap(size: int) -> None:
    """A size is any integer of 64 bits; what is negative is taken modulo 2^64."""
    assert SCHEMA.check_object(MEMFD | {"size": size})["size"] == size % 2**64


@pytest.mark.parametrize(
    ("given", "stored"), [(True, "on"), (False, "off"), ("on", "on"), ("off", "off"), ("auto", "auto")]
)
def test_guest_memfd_takes_booleans(given: Any, stored: str) -> None:
    """true and false mean on and off, in object-add and qom-set."""
    assert SCHEMA.check_object(MEMFD | {"guest-memfd": given})["guest-memfd"] == stored
    assert SCHEMA.check_property("memory-backend-memfd", "guest-memfd", given) == stored


def test_unstable_members_are_refused_by_policy() -> None:
    """unstable-input=reject refuses guest-memfd whatever its value, at its place in the order."""
    sentence = "Unstable parameter guest-memfd disabled by policy"
    for value in ("on", True, 5, "nonsense"):
        assert refusal("object-add", MEMFD | {"guest-memfd": value}, REJECTING) == sentence
    early = refusal("object-add", MEMFD | {"guest-memfd": "on", "seal": 1}, REJECTING)
    assert early == "Invalid parameter type for 'seal', expected: boolean"
    assert refusal("object-add", MEMFD | {"guest-memfd": "on", "foo": 1}, REJECTING) == sentence
    assert refusal("object-add", MEMFD, REJECTING) is None
    assert REJECTING.check_object(MEMFD)["guest-memfd"] == "auto"


def test_unstable_commands_are_refused_by_policy() -> None:
    """A command with the feature unstable is not found under unstable-input=reject."""
    entry = {"doc": "", "arguments": "Nothing", "x-features": ["unstable"]}
    Command(SCHEMA, "x-try", entry).check_policy()
    with pytest.raises(QmpError, match="Unstable command x-try disabled by policy") as caught:
        Command(REJECTING, "x-try", entry).check_policy()
    assert caught.value.error_class == COMMAND_NOT_FOUND


def test_policies_are_known() -> None:
    """Another policy is a mistake of the caller."""
    with pytest.raises(ValueError, match="unstable_input"):
        Schema.load(unstable_input="crash")


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("merge", 1, "Invalid parameter type for 'merge', expected: boolean"),
        ("policy", "x", "Parameter 'policy' does not accept value 'x'"),
        ("policy", None, "Invalid parameter type for 'policy', expected: string"),
        ("host-nodes", 1, "Invalid parameter type for 'host-nodes', expected: array"),
        ("host-nodes", [1, None], "Parameter 'host-nodes[1]' expects uint64"),
        ("host-nodes", [65536], "Parameter 'null' expects uint16_t"),
        ("prealloc-threads", 2**32, "Parameter 'prealloc-threads' expects uint32_t"),
    ],
)
def test_single_properties(name: str, value: Any, sentence: str) -> None:
    """qom-set refuses a value in the words of object-add."""
    with pytest.raises(QmpError) as caught:
        SCHEMA.check_property("memory-backend-memfd", name, value)
    assert caught.value.desc == sentence


def test_unknown_properties_are_the_callers() -> None:
    """A property or type that is not declared is a KeyError: the caller has a sentence of its own."""
    with pytest.raises(KeyError):
        SCHEMA.check_property("memory-backend-ram", "seal", True)
    with pytest.raises(KeyError):
        SCHEMA.properties("secret")


def test_strings_that_are_no_unicode() -> None:
    """A file name from a command line may hold bytes that are no UTF-8."""
    given = {"qom-type": "memory-backend-file", "id": "m0", "size": -1, "mem-path": "/tmp/\udcff"}
    assert SCHEMA.check_object(given)["mem-path"] == "/tmp/\udcff"


def test_any_takes_anything() -> None:
    """A value of type any is handed through as it came."""
    given = {"path": "/", "property": "x", "value": {"a": [1.5, None, {"b": -1}]}}
    assert SCHEMA.commands["qom-set"].check(given) == given


def test_starting_reads_nothing_but_qom_json() -> None:
    """Neither jsonschema nor the QAPI compiler is imported before something must be explained."""
    program = """
import sys
from gmemd.schema.validate import Schema
schema = Schema.load()
schema.introspection()
heavy = {"jsonschema", "referencing", "gmemd.qapi.load", "gmemd.qapi.document", "pathlib"}
schema.check_object({"qom-type": "memory-backend-ram", "id": "m0", "size": 4096})
schema.check_property("memory-backend-ram", "merge", True)
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-S", "-c", _with_path(program)], capture_output=True, text=True)
    assert (done.stdout.splitlines(), done.stderr) == (["[]"], "")


def _with_path(program: str) -> str:
    """The program with this process's module path: -S keeps out what site-packages import by themselves."""
    return f"import sys; sys.path[:] = {sys.path!r}\n{program}"
