"""Whoever is killed at whatever step of prepare and release: the claim has its memory once, or nothing is left.

Here at a few points; script/robustness claims does it at all of them.
"""

from __future__ import annotations

from tests.kubernetes.apiserver import ApiServer
from tests.kubernetes.sweep import ACTS, sweep

STEP = 20  # every so manieth point


def test_killed_at_some_points(api: ApiServer) -> None:
    """Of preparing and of releasing."""
    tally = sweep(api, ACTS[:2], step=STEP)
    assert sum(tally.points.values()) >= 5
