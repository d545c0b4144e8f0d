"""Restarts go unnoticed by whoever has memory mapped: some rungs of script/robustness."""

from __future__ import annotations

from collections.abc import Callable

from tests.robustness.ladder import climb, restart_time


def test_nobody_notices_a_restart(record_property: Callable[[str, object], None]) -> None:
    """SIGTERM, SIGKILL, watchdog: users write on, everything is there with what they wrote last."""
    record_property("figure", climb(6, objects=20, users=2))


def test_many_objects_come_back_soon(record_property: Callable[[str, object], None]) -> None:
    """The time is printed, not judged: it is the machine's."""
    record_property("figure", restart_time(100, 1))
