"""The commands that few clients use: a third of the start's time, so they are loaded after it.

`Loader.load` imports this module in a thread, and with it everything that those commands need.
"""

from __future__ import annotations

import asyncio
import traceback  # noqa: F401  # for the log of an error
from functools import partial
from types import ModuleType
from typing import Any, Final

from gmemd.commands import (
    accounting,
    arriving,
    clones,
    cloning,
    conversion,
    enforce,
    handovers,
    holders,
    housing,
    importing,
    jobs,
    ownership,
    owning,
    prepared,
    quota,
    restoring,
    rights,
    runners,
    saving,
    sending,
    snapshots,
    track,
)
from gmemd.commands.context import Function, Gmemd, function_in
from gmemd.commands.effect import foretell
from gmemd.commands.fences import recover
from gmemd.commands.lease import watch_leases
from gmemd.commands.transaction import carry_out

MODULES: Final[tuple[ModuleType, ...]] = (
    accounting, arriving, clones, cloning, conversion, enforce, handovers, holders, housing, importing, jobs, ownership,
    owning, prepared, quota, restoring, rights, runners, saving, sending, snapshots, track)
_ = asyncio.__all__  # all of it is imported now (server/later.py)
_OUTER: Final[dict[str, Any]] = {"query-command-effect": foretell, "memdev-transaction": carry_out}  # run others


def function_of(name: str, functions: dict[str, Any]) -> Function:
    """The function of a command; `functions`: what those that run others run, by name."""
    if name in _OUTER:
        return partial(_OUTER[name], functions)
    found = function_in(MODULES, name)
    assert found is not None
    return found


def resume(gmemd: Gmemd) -> None:
    """Watch and finish what a predecessor has left in a room."""
    watch_leases(gmemd)
    runners.watch_runners(gmemd)
    handovers.watch_handovers(gmemd)
    recover(gmemd)
