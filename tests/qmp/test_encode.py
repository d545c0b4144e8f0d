"""The bytes QEMU writes, for values of every kind."""

from __future__ import annotations

import enum
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmemd.qmp.encode import encode, encode_pretty, indented, member_order
from gmemd.qmp.stream import Stream
from tests.conformance.cases import load
from tests.conformance.replay import recorded_lines

examples = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def echoed_ids() -> list[Any]:
    """Every id of the corpus with what it was sent as and how it came back."""
    steps = [
        pytest.param(step["text"].encode(), recorded_lines(step)[0].encode(), id=case["case"])
        for case in load("qmp-11.1.jsonl")
        for step in case["steps"]
        if case["case"].startswith("id/") and "text" in step and step["recv"][0].startswith('{"return": {}, "id": ')
    ]
    assert len(steps) > 30
    return steps


@pytest.mark.parametrize(("message", "reply"), echoed_ids())
def test_ids_come_back_as_recorded(message: bytes, reply: bytes) -> None:
    """Numbers, strings and the order of members of an echoed id are QEMU's, byte for byte."""
    stream = Stream()
    stream.feed(message)
    assert reply == encode({"return": {}, "id": stream.next()["id"]})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (False, "false"),
        (0, "0"),
        (-(1 << 63), "-9223372036854775808"),
        ((1 << 64) - 1, "18446744073709551615"),
        (1.0, "1"),
        (-0.0, "-0"),
        (0.1, "0.10000000000000001"),
        (0.42, "0.41999999999999998"),
        (-32.20e-10, "-3.22e-09"),
        (1e22, "1e+22"),
        (2.0**64, "1.8446744073709552e+19"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        ("", '""'),
        ("a/b'c", '"a/b\'c"'),
        ('"\\\b\f\n\r\t', r'"\"\\\b\f\n\r\t"'),
        ("\0\x01\x1f\x7f\x80", r'"\u0000\u0001\u001F\u007F\u0080"'),
        ("éß\u2028\ufffd", r'"\u00E9\u00DF\u2028\uFFFD"'),
        ("😀\U0010fffd", r'"\uD83D\uDE00\uDBFF\uDFFD"'),
        ("\ud800x\udfff\udc80", r'"\uFFFDx\uFFFD\uFFFD"'),
        ("\ufffe\uffff\ufdd0\ufdef\U0001fffe\U0010ffff", '"' + r"\uFFFD" * 6 + '"'),
        ([], "[]"),
        ({}, "{}"),
        ([[], {}, [1, "a", None]], '[[], {}, [1, "a", null]]'),
        ({"return": {}, "id": 1}, '{"return": {}, "id": 1}'),
        ({"id": 1, "return": {"a": []}}, '{"return": {"a": []}, "id": 1}'),
        ({"error": {"class": "C", "desc": "D"}, "id": "x"}, '{"id": "x", "error": {"class": "C", "desc": "D"}}'),
        ({"é": 1, "\n": 2}, r'{"\u00E9": 1, "\n": 2}'),
    ],
)
def test_values(value: Any, text: str) -> None:
    """Doubles print as %.17g, strings in ASCII with upper-case escapes, blanks behind comma and colon."""
    assert text == encode(value).decode()
    assert text == encode([value])[1:-1].decode()


def test_member_order_is_that_of_qdict() -> None:
    """Buckets ascending, inside a bucket the last inserted first, as the recorded answers show."""
    entry = ["share", "reserve", "prealloc", "host-nodes", "size", "merge", "dump", "policy", "id"]
    assert entry == member_order(sorted(entry))
    assert member_order(["event", "data", "timestamp"]) == ["timestamp", "event", "data"]
    assert member_order(["major", "minor", "micro"]) == ["micro", "minor", "major"]


def test_one_bucket_is_last_in_first_out() -> None:
    """Names of one bucket come in the reverse of the order they went in."""
    assert member_order(["micro", "minor"]) == ["minor", "micro"]
    assert member_order(["minor", "micro"]) == ["micro", "minor"]
    assert encode({"micro": 2, "minor": 1}) == b'{"minor": 1, "micro": 2}'
    assert encode({"minor": 1, "micro": 2}) == b'{"micro": 2, "minor": 1}'


def test_subclasses_are_written_as_what_they_are() -> None:
    """Enumerations of strings and integers may stand in values; what is no JSON may not."""

    class Word(enum.StrEnum):
        BIND = "bind"

    class Number(enum.IntEnum):
        ONE = 1

    assert encode([Word.BIND, Number.ONE]) == b'["bind", 1]'
    with pytest.raises(TypeError, match="bytes is not a JSON value"):
        encode({"a": b""})


def test_pretty() -> None:
    """As recorded: 4 blanks a level, a bracket on a line of its own also in an empty container."""
    version = {"qemu": {"major": 11, "minor": 0, "micro": 92}, "package": ""}
    values = [
        {"QMP": {"capabilities": ["oob"], "version": version}},
        {"return": {}},
        {"return": {"running": False, "status": "prelaunch"}, "id": []},
        {"error": {"desc": "3:1: JSON parse error, invalid keyword 'foo'", "class": "GenericError"}},
    ]
    [case] = [case for case in load("qmp-11.1.jsonl") if case["case"] == "pretty/basic"]
    lines = [line for step in case["steps"] for line in step.get("recv", [])]
    assert "\r\n".join(lines).encode() == b"\r\n".join(map(encode_pretty, values))
    assert (
        encode_pretty([1, [{"a": 2}]])
        == b'[\r\n    1,\r\n    [\r\n        {\r\n            "a": 2\r\n        }\r\n    ]\r\n]'
    )


def test_depth_is_no_matter() -> None:
    """What may be read may be written: nesting does not use the Python stack."""
    value: Any = "deep"
    for _ in range(1100):
        value = {"a": [value, 1]}
    assert encode(value) == b'{"a": [' * 1100 + b'"deep"' + b", 1]}" * 1100
    assert encode_pretty(value).count(b"\n") == 1100 * 5


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=5),
    max_leaves=25,
)


@given(trees)
@examples
def test_pretty_differs_only_in_blanks(value: Any) -> None:
    """Both ways of writing put the same texts in the same order."""
    lines = encode_pretty(value).decode().split("\r\n")
    joined = "".join(line.lstrip(" ") + " " * line.endswith(",") for line in lines)
    assert encode(value).decode() == joined


@given(trees)
@examples
def test_what_is_written_is_json(value: Any) -> None:
    """Any JSON reader gets the value back, but for characters that QEMU does not let through."""
    written = encode(value)
    assert written.isascii()
    assert _without_bad(value) == json.loads(written)


def _without_bad(value: Any) -> Any:
    if isinstance(value, str):
        return "".join("\ufffd" if ord(c) & 0xFFFE == 0xFFFE or 0xFDD0 <= ord(c) <= 0xFDEF else c for c in value)
    if isinstance(value, list):
        return [_without_bad(element) for element in value]
    if isinstance(value, dict):
        return {_without_bad(key): _without_bad(value[key]) for key in member_order(value)}
    return value


@given(st.lists(st.text(max_size=6), unique=True, max_size=50))
@examples
def test_member_order_loses_nothing(names: list[str]) -> None:
    """The order is one of the same names, and only names of one bucket depend on what went in first."""
    order = member_order(names)
    assert sorted(names) == sorted(order)
    assert member_order(reversed(order)) == order


@pytest.mark.parametrize("value", [
    {}, [], 1, "a, [\\" , [[], {}, [[]]], {"a": {"b": [1, "x, y", {"c": []}]}, "d": "]}"}, ["\\\"", "\"", 1e400],
    {"return": 1, "id": 2, "size": [{"offset": 1, "size": 2}]},
])
def test_what_was_encoded_is_indented_the_same(value: Any) -> None:
    """Piece by piece, from the bytes, as from the value."""
    whole = encode_pretty({"return": value})
    assert b'{\r\n    "return": ' + b"".join(indented(encode(value))) + b"\r\n}" == whole
