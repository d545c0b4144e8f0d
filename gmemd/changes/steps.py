"""Steps that finish or undo a change: a long one returns a future, which never ends with an error."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from gmemd.changes.waiting import go_on
from gmemd.observe.log import log

Step = tuple[Callable[..., object], tuple[object, ...]]  # a function with its arguments
Ending = asyncio.Future[None] | None  # what to wait for; None: nothing


def after(endings: Iterable[Ending], then: Callable[[], None]) -> None:
    """Call back when the last of these has ended; at once if there is none."""
    waiting = [ending for ending in endings if ending is not None]
    if waiting:
        asyncio.gather(*waiting).add_done_callback(lambda _: in_order(((then, ()),)))
    else:
        in_order(((then, ()),))


def in_order(steps: Sequence[Step]) -> Ending:
    """Take steps, each after the one before has ended."""
    for number, (function, arguments) in enumerate(steps, 1):
        try:
            ending = function(*arguments)
        except Exception as exc:  # is not the others' concern
            log.error("internal error", exc_info=exc)
            continue
        if ending is not None and isinstance(ending, asyncio.Future):
            rest = steps[number:]
            return asyncio.ensure_future(go_on(ending, partial(in_order, rest))) if rest else ending
    return None
