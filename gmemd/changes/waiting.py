"""The coroutines of changes and of their steps, which stay pure in a compiled build (docs/building.md)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol, TypeVar

from gmemd.changes.threads import close_copies

_T = TypeVar("_T")


class Carried(Protocol):
    """A change that does long work."""

    def claims_any(self) -> bool: ...

    def check_live(self) -> None: ...

    def settle(self) -> Awaitable[None]: ...

    def revert(self) -> asyncio.Future[None] | None: ...

    def unclaim(self) -> None: ...


class Others(Protocol):
    """What settles the changes of others."""

    def durable(self) -> Awaitable[None]: ...


async def at_once() -> None:
    """Wait for nothing."""


async def until(there: Callable[[], bool]) -> None:
    """Wait for a condition that few ask for."""
    while not there():
        await asyncio.sleep(0.001)


async def carry(change: Carried, others: Others, work: Coroutine[Any, Any, _T]) -> _T:
    """Do long work, and settle it. If the daemon ends meanwhile, everything is left as after a crash."""
    try:
        if change.claims_any():
            await others.durable()
            change.check_live()
        value = await work
        await change.settle()
        return value
    except Exception:
        ending = change.revert()
        if ending is not None:
            await ending
        raise
    finally:
        work.close()
        change.unclaim()


async def reply(value: _T, settled: asyncio.Future[None], fds: list[int]) -> _T:
    """A reply with descriptors, once it is durable."""
    try:
        await settled
    except asyncio.CancelledError:
        close_copies(fds)
        raise
    return value


async def after_ending(ending: asyncio.Future[None], value: _T) -> _T:
    """The value, once the last step has ended."""
    await ending
    return value


async def raise_after(ending: asyncio.Future[None], error: BaseException) -> None:
    """Raise the error, once everything is undone."""
    await ending
    raise error


async def go_on(ending: asyncio.Future[None], rest: Callable[[], asyncio.Future[None] | None]) -> None:
    """Take the rest of the steps once the one before them has ended."""
    await ending
    last = rest()
    if last is not None:
        await last
