"""Who was answered keeps what it was told, however soon the daemon is killed: a sample of script/robustness."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.robustness.replies import add, objects, run, strike
from tests.robustness.world import World, Wrong

KILLS = 24


def test_what_was_answered_stands(world: World, record_property: Callable[[str, object], None]) -> None:
    done = run(world, KILLS)
    assert done["answered"] > KILLS
    assert done["answered while the keeper stood still"] > 0
    record_property("figure", f"killed after replies: {dict(done)}")


def test_an_answer_that_does_not_stand_is_noticed(world: World) -> None:
    careless = [add("careless"), ("memdev-persist", {"id": "careless", "persist": False})]
    with pytest.raises(Wrong, match=r"'careless' is '' and not one of {'new'}"):
        strike(world, objects(world), [careless], 2)
