"""A daemon that is killed during its work on snapshots: a sample of script/robustness."""

from __future__ import annotations

import pytest

from tests.robustness.stored import ACTS, sweep
from tests.robustness.world import World


@pytest.mark.parametrize("act", ["save, live and compressed", "restore over", "delete"])
def test_whole_or_absent(world: World, act: str) -> None:
    """Each snapshot is whole or absent, the object as it was or as it should become, and nothing is left behind."""
    said: list[str] = []
    assert sweep(world, ACTS[act], 3, said.append) == 0, said
