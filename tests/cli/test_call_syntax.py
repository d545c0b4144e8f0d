"""The call syntax: words into arguments, by introspection."""

from __future__ import annotations

from typing import Any

import pytest

from gmemd.cli.call_syntax import UsageError, arguments_of, parse_integer
from gmemd.cli.introspection import Introspection

# A schema as on the wire: names of types are numbers, and mean nothing.
SCHEMA: list[dict[str, Any]] = [
    {"name": "go", "meta-type": "command", "arg-type": "1", "ret-type": "0"},
    {"name": "none", "meta-type": "command", "arg-type": "0", "ret-type": "[9]"},
    {"name": "HAPPENED", "meta-type": "event", "arg-type": "0"},
    {"name": "0", "meta-type": "object", "members": []},
    {
        "name": "1",
        "meta-type": "object",
        "tag": "kind",
        "members": [
            {"name": "kind", "type": "2"},
            {"name": "flag", "type": "bool", "default": None},
            {"name": "number", "type": "int", "default": None},
            {"name": "real", "type": "number", "default": None},
            {"name": "text", "type": "str", "default": None, "features": ["unstable"]},
            {"name": "thing", "type": "any", "default": None},
            {"name": "nodes", "type": "[int]", "default": None},
            {"name": "names", "type": "[str]", "default": None},
            {"name": "either", "type": "3", "default": None},
            {"name": "inner", "type": "4", "default": None},
        ],
        "variants": [{"case": "a", "type": "5"}, {"case": "b", "type": "0"}],
    },
    {"name": "2", "meta-type": "enum", "members": [{"name": "a"}, {"name": "b"}], "values": ["a", "b"]},
    {"name": "3", "meta-type": "alternate", "members": [{"type": "6"}, {"type": "bool"}]},
    {
        "name": "4",
        "meta-type": "object",
        "members": [{"name": "deep", "type": "4"}, {"name": "size", "type": "int"}],
    },
    {"name": "5", "meta-type": "object", "members": [{"name": "only-a", "type": "bool"}]},
    {"name": "6", "meta-type": "enum", "values": ["auto", "on", "off"]},
    {"name": "9", "meta-type": "object", "members": [{"name": "y", "type": "int"}, {"name": "x", "type": "int"}]},
    {"name": "[9]", "meta-type": "array", "element-type": "9"},
    {"name": "[int]", "meta-type": "array", "element-type": "int"},
    {"name": "[str]", "meta-type": "array", "element-type": "str"},
    *(
        {"name": name, "meta-type": "builtin", "json-type": json_type}
        for name, json_type in (
            ("bool", "boolean"),
            ("int", "int"),
            ("number", "number"),
            ("str", "string"),
            ("any", "value"),
        )
    ),
]
KNOWN = Introspection(SCHEMA)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("flag=on", True),
        ("flag=off", False),
        ("flag=true", True),
        ("flag=maybe", "maybe"),
        ("number=12", 12),
        ("number=-12", -12),
        ("number=0x10", 16),
        ("number=1G", 1 << 30),
        ("number=1.5k", 1536),
        ("number=much", "much"),
        ("real=1.5", 1.5),
        ("real=1e400", "1e400"),
        ("text=12", "12"),
        ("text=a=b,c", "a=b,c"),
        ("text=", ""),
        ("thing=false", False),
        ('thing={"a":[1]}', {"a": [1]}),
        ("thing=NaN", "NaN"),
        ("thing=off", "off"),
        ("nodes=0", [0]),
        ("nodes=0,2-4", [0, 2, 3, 4]),
        ("nodes=[7]", [7]),
        ("nodes=", []),
        ("nodes=4-2", ["4-2"]),
        ("nodes=0-9999999", ["0-9999999"]),
        ("names=a-b,0-3", ["a-b", "0-3"]),
        ("either=on", "on"),
        ("either=true", True),
        ("either=perhaps", "perhaps"),
        ('inner={"size":1}', {"size": 1}),
        ("inner=x", "x"),
        ("only-a=on", True),
        ("unknown=1", 1),
        ("unknown=x", "x"),
    ],
)
def test_word_takes_the_type_of_its_argument(word: str, value: Any) -> None:
    """A word becomes what its argument is declared as, or stays text for the server to refuse."""
    name = word.partition("=")[0]
    found = arguments_of([word, "kind=a"], "go", KNOWN)[name]
    assert (found, type(found)) == (value, type(value))


def test_list_grows_by_repetition() -> None:
    """A list given twice is one list, another argument given twice the last."""
    words = ["nodes=0-1", "nodes=5", "flag=on", "flag=off"]
    assert arguments_of(words, "go", KNOWN) == {"nodes": [0, 1, 5], "flag": False}


def test_dots_reach_inside() -> None:
    """key.key=value gives a member of a member."""
    words = ["inner.size=1M", "inner.deep.size=2"]
    assert arguments_of(words, "go", KNOWN) == {"inner": {"size": 1 << 20, "deep": {"size": 2}}}


def test_variant_decides_types() -> None:
    """A member of another variant is not known, so its word is taken as JSON."""
    assert arguments_of(["only-a=on", "kind=b"], "go", KNOWN) == {"only-a": "on", "kind": "b"}


def test_json_object_gives_all() -> None:
    """A word that begins with a brace is a JSON object of arguments."""
    assert arguments_of(['{"kind": "a", "number": 1.0}', "only-a=on"], "go", KNOWN) == {
        "kind": "a",
        "number": 1.0,
        "only-a": True,
    }


@pytest.mark.parametrize("words", [["flag"], ["=1"], ["{"], ["inner=x", "inner.size=1"]])
def test_wrong_words(words: list[str]) -> None:
    """What cannot be read at all is an error of the command line."""
    with pytest.raises(UsageError):
        arguments_of(words, "go", KNOWN)


@pytest.mark.parametrize("text", ["", "-", "G", "1 2", "0x", "1e3", "٣"])
def test_no_integer(text: str) -> None:
    """Only what QEMU's command line takes is an integer."""
    assert parse_integer(text) is None


def test_introspection() -> None:
    """Names, members by variant, enum values, and types in words."""
    assert KNOWN.names("command") == ["go", "none"]
    assert KNOWN.names("event") == ["HAPPENED"]
    assert KNOWN.members("absent") == []
    assert [member.name for member in KNOWN.members("go", {"kind": "a"})][-1] == "only-a"
    assert [member.name for member in KNOWN.members("go", {"kind": "b"})][-1] == "inner"
    assert KNOWN.cases_with("go", "only-a") == ["a"]
    assert KNOWN.member("go", "text", {}) == ("text", "str", True, ("unstable",))
    assert KNOWN.values("3") == ["auto", "on", "off"]
    assert KNOWN.result_members("none") == ["y", "x"]
    described = [KNOWN.describe(name) for name in ("2", "3", "4", "[9]", "int")]
    assert described == ["a|b", "auto|on|off or bool", "{deep, size}", "[{y, x}]", "int"]
