"""Moments in seconds since boot: setting the wall clock does not change how long ago they are.

Memory does not outlive the boot, so these serve for an object's whole life, across restarts of the daemon.
"""

from __future__ import annotations

import time
from typing import Final

_STEP: Final = 2.0  # seconds by which the wall clock must have been set for a moment to be converted again


def now() -> float:
    """Seconds since boot, suspended ones included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class _Wall:
    """When the machine booted by the wall clock; stays the same while the clock is only adjusted."""

    def __init__(self) -> None:
        self._booted = self._ask()

    @staticmethod
    def _ask() -> float:
        return round(time.time() - now())

    @property
    def booted(self) -> float:
        """Seconds since 1970."""
        asked = self._ask()
        if abs(asked - self._booted) >= _STEP:
            self._booted = asked
        return self._booted


_WALL: Final = _Wall()


def on_the_wall(moment: float) -> float:
    """The same moment in seconds since 1970, as the wall clock counts now."""
    return _WALL.booted + moment


def from_record(moment: float | None, wall: float) -> float:
    """A recorded moment; where it was not recorded, or not since this boot, from the wall clock's time then."""
    if moment is not None and 0 <= moment <= now():
        return moment
    return min(now(), max(0.0, wall - on_the_wall(0)))
