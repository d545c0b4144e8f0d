"""Whoever stands still for a copy goes on when gmemd is killed: a sample of script/robustness fences."""

from __future__ import annotations

from collections.abc import Callable

from tests.robustness.fences import strike
from tests.robustness.world import World


def test_whoever_stands_still_goes_on(world: World, record_property: Callable[[str, object], None]) -> None:
    """After SIGKILL at a call the next daemon knows of no fence, and a snapshot is whole or absent."""
    tally = strike(world, step=1500, first=2300, most=2)
    assert tally.points == 2
    record_property("figure", f"{tally.points} kills, {tally.results['saved']} after it was saved")
