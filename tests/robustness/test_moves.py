"""A move has one owner whatever ends when: a sample of script/robustness."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.robustness.moves import MESSAGES, Pair


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with Pair() as made:
        yield made


def test_the_messages_of_a_move(pair: Pair) -> None:
    """Without a strike; the sweep counts on these."""
    assert pair.strike_message(-1, "", "", "source") == list(MESSAGES)


@pytest.mark.parametrize(("message", "when", "end", "asks"), [
    ("ENDS", "after", "source", "destination"),
    ("DURA", "before", "line", "destination"),
    ("DURA", "after", "destination", "source"),
    ("YOUR", "before", "source", "destination"),
    ("YOUR", "before", "line", "source"),
    ("YOUR", "after", "source", "destination"),
    ("YOUR", "after", "destination's worker", "destination"),
    ("DONE", "before", "destination", "source"),
])
def test_whatever_ends_at_a_message_one_side_owns_it(pair: Pair, message: str, when: str, end: str,
                                                     asks: str) -> None:
    """Daemon, worker or line: never both, and after one question exactly one, with every byte."""
    pair.strike_message(MESSAGES.index(message), when, end, asks)


def test_an_earlier_attempt_is_remembered(pair: Pair) -> None:
    """Its destination may ask late, when the source has tried once more: it learns that the attempt has failed."""
    pair.prepare()
    pair.attempt(MESSAGES.index("DURA"), "before", "line")
    assert pair.states() == {"source": "kept", "destination": "prepared"}
    pair.attempt(-1, "", "")  # refused, because the id is taken there
    pair.judge("destination")
    assert pair.states() == {"source": "kept"}


@pytest.mark.parametrize("side", ["source", "destination"])
def test_killed_at_a_system_call(pair: Pair, side: str) -> None:
    """Some of the last ones, among which the state becomes durable."""
    _, count = pair.strike_call(0, side, "source")
    for at in (count - 20, count - 90):
        pair.strike_call(at, side, "destination")
