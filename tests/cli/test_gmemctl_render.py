"""How gmemctl prints."""

from __future__ import annotations

from typing import Any

import pytest

from gmemd.cli import render


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (4 << 20, "4 MiB"),
        ((1 << 30) + 1, "1 GiB"),
        (1288490189, "1.2 GiB"),
        ((1 << 64) - 1, "16 EiB"),
    ],
)
def test_size(number: int, text: str) -> None:
    """Sizes stand in the largest unit that leaves a whole number, with one decimal."""
    assert render.size(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59, "59s"), (60, "1m"), (130, "2m 10s"), (3600, "1h"), (3725, "1h 2m"), (90000, "1d 1h")],
)
def test_duration(seconds: int, text: str) -> None:
    """Durations stand in their two largest units."""
    assert render.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([{"b": 1, "size": 2048}, {"b": 22, "c": "x"}], " B   SIZE  C\n 1  2 KiB\n22         x"),
        ({"b": True, "name": "x\ny", "host-nodes": [0]}, 'name        "x\\ny"\nb           true\nhost-nodes  [0]'),
        (["a", 1, None], "a\n1\nnull"),
        ("text", "text"),
        (1.5, "1.5"),
        ([], ""),
    ],
)
def test_value(value: Any, text: str) -> None:
    """Objects are lines, lists of objects a table, numbers to the right; control characters never get out."""
    assert str(render.value(value, ["absent", "name"])) == text


def test_user_without_name() -> None:
    """A uid without a name stands as it is."""
    assert render.user(0) == "root"
    assert render.user(4_000_000_000) == "4000000000"


def test_no_text_controls_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever has written it, such as the manifest of a snapshot."""
    render.show(render.Table(("NAME",), [("\x1b[2J\x9b",), ("as it is: ä",)]))
    assert capsys.readouterr().out == 'NAME\n"\\u001b[2J\\u009b"\nas it is: ä\n'
