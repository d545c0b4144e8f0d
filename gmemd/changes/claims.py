"""Long work on an object: claimed when the command is judged, so that no other changes it before the work has ended.

Work that was judged but has not begun is work all the same: between the two others have their turn of the loop.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.threads import close_beside
from gmemd.errors import QmpError

if TYPE_CHECKING:
    from gmemd.commands.context import Gmemd


def claimed(gmemd: Gmemd, backend: HostMemoryBackend, doing: str,
            work: Callable[[], Awaitable[Any]]) -> Coroutine[Any, Any, Any]:
    """Claim an object now, or raise QmpError; the coroutine, which must be run, does the work and ends the claim.

    What others changed before is durable, or undone, when the work begins.
    """
    backend.claim(doing)

    async def run() -> Any:
        try:
            await gmemd.durable()
            check_live(gmemd, backend)
            return await work()
        finally:
            close_beside(backend.unclaim())

    return run()


def check_live(gmemd: Gmemd, backend: HostMemoryBackend) -> None:
    """Raise QmpError for an object that is no longer there: its creation could not be made durable."""
    if gmemd.objects.get(backend.id) is not backend:
        raise QmpError(f"object '{backend.id}' not found")
