"""How long turns are, and who is next."""

from __future__ import annotations

from collections.abc import Callable

from gmemd.server.turns import SHORT_TURN_SECONDS, TURN_SECONDS, Turns


class Waiting:
    """A loop as turns see it."""

    def __init__(self) -> None:
        self.others = False
        self.after: list[Callable[[], object]] = []
        self.call_after_readers = self.after.append

    def awaited(self, fd: int) -> bool:
        return self.others


def test_turns_are_short_while_others_wait() -> None:
    """And for some time afterwards, because they come again."""
    loop = Waiting()
    turns = Turns(loop)  # type: ignore[arg-type]
    assert not turns.is_over(1)
    assert turns.seconds == TURN_SECONDS
    loop.others = True
    assert turns.is_over(1)
    assert turns.seconds == SHORT_TURN_SECONDS
    loop.others = False
    lengths = []
    while turns.seconds < TURN_SECONDS:
        assert not turns.is_over(1)
        lengths.append(turns.seconds)
    assert 10 < len(lengths) < 100


def test_turns_are_long_among_many_that_have_much_to_do() -> None:
    """Going from one to the next would cost too much of a short turn."""
    loop = Waiting()
    turns = Turns(loop)  # type: ignore[arg-type]
    loop.others = True
    turns.go_on(lambda: None)
    turns.is_over(1)
    assert turns.seconds == TURN_SECONDS
    loop.after.pop()()
    turns.is_over(1)
    assert turns.seconds == SHORT_TURN_SECONDS


def test_the_unfinished_go_on_in_their_order() -> None:
    loop = Waiting()
    turns = Turns(loop)  # type: ignore[arg-type]
    seen: list[int] = []
    for number in range(3):
        turns.go_on(lambda number=number: seen.append(number))  # type: ignore[misc]
    while loop.after:
        loop.after.pop(0)()
    assert seen == [0, 1, 2]
