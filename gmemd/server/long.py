"""A long command of a client, as a task of the event loop."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any

from gmemd.changes.pace import Pace
from gmemd.qmp.encode import Indented, indented
from gmemd.qmp.rows import Pieces


async def run(work: Coroutine[Any, Any, Any], turn: AbstractAsyncContextManager[object], *, pretty: bool,
              ended: Callable[[Any], None]) -> None:
    """Do the work in its turn; `ended` gets its result or the exception, in the form for a client with `pretty`."""
    try:
        async with turn:
            result = await work
        if pretty and type(result) in (bytes, Pieces):
            result = await _indent(b"".join(result) if type(result) is Pieces else result)
    except Exception as exc:
        result = exc
    ended(result)


async def _indent(text: bytes) -> Indented:
    """Format a long answer, with turns for others in between."""
    pace, made = Pace(), bytearray()
    for piece in indented(text):
        made += piece
        await pace.keep()
    return Indented(bytes(made))
