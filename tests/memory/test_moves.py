"""Who owns an object that is moved: every order of messages, crashes, broken lines and questions.

The model has the durable state of both sides and what is under way on the one line; it does what sending.py and
arriving.py do with gmemd/memory/moves.py, a step at a time, and anything may end in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import pytest

from gmemd.errors import QmpError
from gmemd.memory.moves import AWAY, DROPPED, UNKNOWN, Move, answered, concluded

GIVEN_UP = ("moved", "gone")


class World(NamedTuple):
    """The source's state, the destination's ("": nothing there), and the latest message on the line ("": it is cut)."""

    source: str = "offered"
    destination: str = ""
    line: str = "HEAD"


def next_of(world: World) -> Iterator[World]:
    """What may come next."""
    yield from _along_the_line(world)
    if world.line:
        yield world._replace(line="")  # a side, a worker or the line has ended
    else:
        yield from _asked(world)


def _along_the_line(world: World) -> Iterator[World]:
    if world.line == "HEAD":
        yield world._replace(destination="prepared", line="prepared")
    elif world.line == "prepared":
        yield world._replace(line="DURA")
    elif world.line == "DURA":
        yield world._replace(source="moved", line="moved")
        yield world._replace(source="kept", line="KEEP")  # the fence did not hold, or it cannot be made durable
    elif world.line == "moved":
        yield world._replace(line="YOUR")
    elif world.line == "YOUR":
        yield world._replace(destination="owned", line="owned")
    elif world.line == "owned":
        yield world._replace(line="DONE")
    elif world.line == "DONE":
        yield world._replace(source="gone", line="end")
    elif world.line == "KEEP":
        yield world._replace(destination="", line="end")


def _asked(world: World) -> Iterator[World]:
    """Either side asks the other; what it does with the answer may be lost, too."""
    if world.source in ("offered", "kept", "moved"):
        source = "kept" if world.source == "offered" else world.source
        yield world._replace(source=source)
        says, after = answered(source, world.destination or None)
        destination = "" if after in (DROPPED, None) else after
        yield world._replace(source=source, destination=destination)
        with suppress(QmpError):
            yield world._replace(source=concluded(source, says), destination=destination)
    if world.destination == "prepared":
        says, after = answered("prepared", world.source)
        assert after is not None
        yield world._replace(source=after)
        final = concluded("prepared", says)
        yield world._replace(source=after, destination="" if final == DROPPED else final)


def reached() -> dict[World, World | None]:
    """Every world that can be reached, with one that it comes from."""
    found: dict[World, World | None] = {World(): None}
    todo = [World()]
    while todo:
        world = todo.pop()
        for after in next_of(world):
            if after not in found:
                found[after] = world
                todo.append(after)
    return found


def test_never_two_owners_and_never_none() -> None:
    """The source owns until it has given up, the destination from when it knows; all the memory is always somewhere."""
    worlds = reached()
    assert len(worlds) > 15
    for world in worlds:
        owners = [world.source not in GIVEN_UP, world.destination == "owned"]
        assert sum(owners) <= 1, world
        if not any(owners):
            assert (world.source, world.destination) == ("moved", "prepared"), world
        if world.source == "gone":
            assert world.destination == "owned", world


def test_every_move_can_be_ended() -> None:
    """From wherever it is left, questions alone lead to where only one side has it and the other does not wait."""
    ends = {(source, destination) for source, destination in
            (("kept", ""), ("offered", ""), ("gone", "owned"))}
    for world in reached():
        todo, seen = [world._replace(line="")], set()
        while todo:
            one = todo.pop()
            if one not in seen:
                seen.add(one)
                todo += _asked(one)
        assert any((one.source, one.destination) in ends for one in seen), world
        owner = {one.destination == "owned" for one in seen if (one.source, one.destination) in ends}
        assert len(owner) == 1, f"{world}: who owns it depends on who asks"


def test_asking_twice_changes_nothing() -> None:
    """An answer is the same when the first one was lost."""
    for asked in ("prepared", "moved", "kept"):
        for known in (None, "offered", "kept", "moved", "gone", "prepared", "owned"):
            says, after = answered(asked, known)
            if after != DROPPED:
                assert answered(asked, after) == (says, after)


def test_who_does_not_know_decides_nothing() -> None:
    """Nothing is dropped because of a side that has never heard of it, as when it is the wrong one."""
    for state in sorted(AWAY):
        assert answered(state, None) == (UNKNOWN, None)
        with pytest.raises(QmpError, match="knows nothing of this move"):
            concluded(state, UNKNOWN)
    assert concluded("kept", UNKNOWN) == "kept"


def test_two_owners_are_noticed() -> None:
    """If a person was wrong with 'force', the question says so instead of freeing anything."""
    assert answered("kept", "owned") == ("owned", "owned")
    with pytest.raises(QmpError, match="says 'owned', and here it is 'kept'"):
        concluded("kept", "owned")


def test_a_note_survives_the_record() -> None:
    move = Move("t", "moved", "unix:/b", 4)
    assert Move(**move.dump()) == move
    assert move.now("gone").token == "t"


def test_failed_attempts_are_remembered() -> None:
    """Sixteen of them, until one has succeeded; what is not known is not answered."""
    move = Move("0", "kept", "b", 1)
    for number in range(1, 21):
        move = Move(str(number), "kept", "b", 1, move.after())
    assert [move.knows(str(number)) for number in (3, 4, 19, 20, 21)] == [None, "kept", "kept", "kept", None]
    assert move.now("moved").knows("20") == "moved"
    assert move.now("owned").after() == ()
