"""How values read, and what makes a difference between two pictures of the page."""

from __future__ import annotations

import pytest

from gmemd.web.live import changes
from gmemd.web.picture import Picture
from gmemd.web.words import bar, members, moment, percent, plural, size


@pytest.mark.parametrize(("count", "text"), [
    (0, "0 bytes"), (1023, "1023 bytes"), (1024, "1 KiB"), (1536, "1.5 KiB"), (64 << 20, "64 MiB"),
    ((1 << 40) + 1, "1 TiB"), ((1 << 64) - 1, "16 EiB")])
def test_sizes(count: int, text: str) -> None:
    """Three digits at most, and no decimals where there is nothing behind the point."""
    assert size(count) == text


@pytest.mark.parametrize(("part", "whole", "text"), [
    (0, 0, "0 %"), (0, 9, "0 %"), (9, 9, "100 %"), (1, 10_000, "< 1 %"), (9_999, 10_000, "> 99 %"), (1, 3, "33 %")])
def test_shares(part: int, whole: int, text: str) -> None:
    """Only nothing is 0 %, and only everything is 100 %."""
    assert percent(part, whole) == text


def test_numbers_of_things() -> None:
    """One is one."""
    assert [plural(1, "object"), plural(2, "object"), plural(10_000, "entry", "entries")] == [
        "1 object", "2 objects", "10,000 entries"]


def test_moments_are_utc() -> None:
    """For machines and for people."""
    assert moment(0) == '<time datetime="1970-01-01T00:00:00Z">1970-01-01 00:00:00</time>'


def test_data_is_only_text() -> None:
    """Whatever an event carries."""
    assert members({"id": "<b>"}) == "<span><i>id</i>\u00a0&lt;b&gt;</span>"


def test_a_bar_of_nothing() -> None:
    """Is empty, and still says what it is."""
    assert 'aria-label="0 of 0"' in bar([("used", 0)], 0, "0 of 0")


def test_only_what_has_changed_is_told() -> None:
    """The first viewer is told all, the next message has the difference, and an equal picture is no message."""
    one = Picture({"host": "h", "jobs": "j"}, {"a": "1", "b": "2"})
    two = Picture({"host": "h", "jobs": "k"}, {"b": "3"})
    assert changes(Picture({}, {}), one) == {"sections": one.sections, "rows": one.rows, "order": ["a", "b"]}
    assert changes(one, one) == {}
    assert changes(one, two) == {"sections": {"jobs": "k"}, "rows": {"b": "3"}, "order": ["b"]}
