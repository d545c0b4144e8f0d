"""Steps that finish a change or undo it: one that takes long returns a future, which ends by no error."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator

from gmemd.observe.log import log

Step = Callable[[], object]
Ending = asyncio.Future[None] | None  # what is still to be waited for; None: nothing


def carry_out(step: Step) -> object:
    """Take one of many steps; what is wrong with it is not the others' concern."""
    try:
        return step()
    except Exception as exc:
        log.error("internal error", exc_info=exc)
        return None


def after(endings: Iterable[Ending], then: Callable[[], None]) -> None:
    """Call back when the last of these has ended; at once, when there is none."""
    waiting = [ending for ending in endings if ending is not None]
    if waiting:
        asyncio.gather(*waiting).add_done_callback(lambda _: carry_out(then))
    else:
        carry_out(then)


def in_order(steps: Iterator[Step]) -> Ending:
    """Take steps, each when the one before has ended."""
    for step in steps:
        ending = carry_out(step)
        if isinstance(ending, asyncio.Future):
            return asyncio.ensure_future(_go_on(ending, steps))
    return None


async def _go_on(ending: asyncio.Future[None], steps: Iterator[Step]) -> None:
    await ending
    rest = in_order(steps)
    if rest is not None:
        await rest
