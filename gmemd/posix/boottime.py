"""Moments in seconds since boot: setting the wall clock does not change how long ago they are.

They serve across restarts of the daemon. Memory that a live update carries into another boot needs the wall clock's.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Final

_STEP: Final = 2.0  # seconds by which the wall clock must have been set for a moment to be converted again


def boot_id() -> str:
    """What tells this boot from all others; "": unknown."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip().replace("-", "")
    except OSError:
        return ""


now: Final = partial(time.clock_gettime, time.CLOCK_BOOTTIME)  # seconds since boot, suspended ones included


_booted = float("-inf")  # seconds since 1970; stays the same while the wall clock is only adjusted


def on_the_wall(moment: float) -> float:
    """The same moment in seconds since 1970, as the wall clock counts now."""
    global _booted
    booted = round(time.time() - now())
    if abs(booted - _booted) >= _STEP:
        _booted = booted
    return _booted + moment


def from_record(moment: float | None, wall: float) -> float:
    """A recorded moment; where it was not recorded, or not since this boot, from the wall clock's time then."""
    if moment is not None and 0 <= moment <= now():
        return moment
    return min(now(), max(0.0, wall - on_the_wall(0)))
