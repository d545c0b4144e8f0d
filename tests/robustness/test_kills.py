"""A daemon that is killed at a system call loses nothing that it has acknowledged: a sample of script/robustness."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.robustness.scenarios import BY_NAME, Scenario
from tests.robustness.sweep import kills
from tests.robustness.world import World, Wrong

# Which calls: every `step`-th. All of those that change the registry or the store, some of the long ones.
SAMPLE = {
    "object-add memfd": 2,
    "object-add file, made": 5,
    "object-add guest-memfd, preallocated": 17,
    "three object-add": 4,
    "object-del memfd": 2,
    "object-del one, object-add another": 3,
    "qom-set merge": 3,
    "qom-set prealloc": 19,
    "memdev-get-fd": 2,
    "memdev-get-fd, leased": 6,
    "add-fd": 1,
    "getfd and memdev-adopt": 5,
    "memdev-freeze": 9,
    "memdev-clone": 3,
    "memdev-clone, copied": 599,
    "object-del of a template": 399,
    "memdev-room-add": 11,
    "memdev-room-del": 5,
    "transaction of a room and what is in it": 13,
    "transaction that empties and removes a room": 7,
    "transaction of all kinds": 7,
    "transaction, preallocating": 41,
}


@pytest.mark.parametrize("name", SAMPLE)
def test_whoever_kills_it_what_was_acknowledged_is_there(world: World, name: str,
                                                         record_property: Callable[[str, object], None]) -> None:
    """After SIGKILL at a call an object is as it was or as it should become; no descriptor is too many."""
    tally = kills(world, BY_NAME[name], step=SAMPLE[name], first=SAMPLE[name])

    assert tally.points > 1
    record_property("figure", f"{name}: {tally.points} kills, {tally.results['acknowledged']} after the reply")


def test_a_loss_is_noticed(world: World) -> None:
    """An object that is not kept is missed after a kill."""
    kept = BY_NAME["memdev-get-fd"]
    careless = Scenario("careless", kept.requests, kept.before, [("memdev-persist", {"id": "x", "persist": False})],
                        outlives=True)

    with pytest.raises(Wrong, match="'x' is absent"):
        kills(world, careless)

    assert kills(world, kept).points > 1
