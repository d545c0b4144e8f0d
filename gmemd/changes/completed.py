"""The end of a command that another part of gmemd runs."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from gmemd.changes.change import Change


async def completed(result: Any) -> Any:
    """The final, durable value of a command's result, whatever its form; QmpError if it fails."""
    if isinstance(result, Coroutine):
        result = await result
    if type(result) is Change:
        await result.settled()
        return result.value
    return result
