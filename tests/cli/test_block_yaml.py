"""What `-o yaml` prints is YAML, and means what JSON would."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import yaml
from hypothesis import given, settings

from gmemd.cli.block_yaml import as_yaml

# What YAML takes for something else than a text, or for syntax; and what JSON can hold.
TRAPS = ["", "y", "No", "ON", "null", "~", "True", ".inf", "1e3", "0x1F", "0o7", "1_000", "12:30:45", "2026-11-29", "-",
         "- a", "a: b", "a:", ":a", "a #b", "#a", "a ", " a", "a\n", "a\tb", "{a}", "[a]", "a,b", "&a", "*a", "!a", "|",
         ">", "%a", "@a", "`a`", "'a'", '"a"', "=", "<<", "---", "...", "?", "a\x00b", "\x7f", "\x85", "\u2028",
         "\ufeff", "\ud800", "\U0001f600", "\U000e0001", "memory-backend-memfd", "/dev/shm/x", "/memfd:x (deleted)",
         "it's"]
TEXTS = st.one_of(st.sampled_from(TRAPS), st.text(max_size=30),
                  st.text(alphabet="aAyn01 :#-.,?[]{}&*!|>'\"%@`\\/~=_\n", max_size=10))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)), max_leaves=20)


@given(VALUES)
@settings(max_examples=200, deadline=None)
def test_it_is_read_as_the_same(value: Any) -> None:
    """By a reader of YAML 1.1, which is the pickier one: types, order, every character."""
    found = yaml.safe_load(as_yaml(value))
    assert found == value
    assert repr(found) == repr(value)


@pytest.mark.parametrize("text", TRAPS)
def test_traps(text: str) -> None:
    """As a value, as a name, and in a list."""
    for value in (text, {text: text}, [text, [text]], [{text: [text]}]):
        assert yaml.safe_load(as_yaml(value)) == value


def test_block_style() -> None:
    """As people expect it of kubectl: words without quotes, lists not indented."""
    value = {"id": "ram0", "size": 4096, "share": True, "nodes": [0, 1], "owner": {"uid": 0}, "fates": [
        {"event": "crash", "answer": "no"}], "none": [], "path": "/dev/shm/a b", "text": "a: b"}
    assert as_yaml(value) == """\
id: ram0
size: 4096
share: true
nodes:
- 0
- 1
owner:
  uid: 0
fates:
- event: crash
  answer: "no"
none: []
path: /dev/shm/a b
text: "a: b\""""
