"""Know who keeps the memory, and what it really keeps, for as long as the daemon runs.

systemd is asked after the start, whenever it may have been reloaded, and now and then; what it has let go of, as it
does when the unit file is missing at a reload, this process still has, and it is given again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from functools import partial
from time import monotonic
from typing import Final, Protocol

from gmemd.changes.threads import in_thread
from gmemd.commands.context import Gmemd
from gmemd.errors import QmpError
from gmemd.persist.keeping import Keeping, Unit
from gmemd.persist.unit import mark

TICK: Final = 2.0  # seconds between two looks at whether systemd has been reloaded
RENEWED: Final = 20.0  # seconds after which it is asked if it has not
FRESH: Final = 30.0  # seconds for which an answer is believed
PATIENCE: Final = 2.0  # seconds for which a command waits for an answer


class Manager(Protocol):
    """The service manager, as far as it is asked here."""

    def ask(self) -> Unit | None:
        """What systemd says of the service; None where it does not answer. Blocks."""
        ...


class Outlook:
    """What is known of the manager. To be made when the event loop runs."""

    def __init__(self, gmemd: Gmemd, manager: Manager, tell: Callable[[str], None], *,
                 mark: Callable[[], int] = mark, patience: float = PATIENCE) -> None:
        self._gmemd = gmemd
        self._manager = manager
        self._tell = tell  # the operator
        self._mark = mark
        self._patience = patience
        self._seen = 0  # the mark when systemd was asked last
        self._asked = -FRESH  # when that was, monotonic seconds
        self._looking: asyncio.Task[None] | None = None
        self._told = ""

    def start(self) -> None:
        """Look now, and again for as long as the loop runs."""
        if self._gmemd.keeping.manager == "systemd":
            self._tick()

    def is_stale(self, after: float = FRESH) -> bool:
        """Whether systemd may say something else by now; `after`: seconds."""
        if self._gmemd.keeping.manager != "systemd":
            return False
        mark = self._mark()
        return mark != self._seen or monotonic() - self._asked >= (after if mark else TICK)

    def must_look(self) -> bool:
        """Whether it has to be waited for what systemd says."""
        return self.is_stale() or (self._looking is not None and not self._looking.done())

    def keeping(self) -> Keeping:
        """Who keeps what, as far as it is known now."""
        keeping, custody = self._gmemd.keeping, self._gmemd.custody
        held = 0 if custody is None else custody.room[0]
        return keeping._replace(held=held, unit=None if self.is_stale() else keeping.unit)

    async def look(self) -> None:
        """Ask, once for all that want it at the same time, until what is known is fresh; but wait not for long."""
        end = monotonic() + self._patience
        while self.must_look() and (left := end - monotonic()) > 0:
            if self._looking is None or self._looking.done():
                self._looking = asyncio.get_running_loop().create_task(self._look())
            await asyncio.wait({self._looking}, timeout=left)

    def _tick(self) -> None:
        if self.is_stale(RENEWED) and not self._gmemd.stopping:
            self._asked = min(self._asked, monotonic() - FRESH)
            self._gmemd.spawn(self.look())
        asyncio.get_running_loop().call_later(TICK, self._tick)

    async def _look(self) -> None:
        unit, missing = await self._ask()
        if unit is not None and missing and unit.stored < unit.limit:
            before = missing
            await self._give_again(wholly=unit.stored == 0)
            unit, missing = await self._ask()
            if not missing:
                self._tell(f"systemd had let go of {before} descriptors, and was given them again")
        words = self._trouble(unit, missing)
        if words and words != self._told:
            self._tell(words)
        self._told = words

    def _trouble(self, unit: Unit | None, missing: int) -> str:
        """What the operator should know; "" when all is well."""
        custody = self._gmemd.custody
        if unit is None and custody is not None and self._gmemd.keeping.old:
            return (f"systemd does not say how many descriptors it keeps, and could not be asked: "
                    f"{custody.room[1]} are counted on (GMEMD_FDSTORE tells another number)")
        if unit is None or not missing:
            return ""
        return f"systemd does not hold {missing} descriptors: raise FileDescriptorStoreMax= (it is {unit.limit})"

    async def _ask(self) -> tuple[Unit | None, int]:
        """What systemd says, and how many descriptors it should hold and does not."""
        custody, keeping = self._gmemd.custody, self._gmemd.keeping
        seen, steady = self._mark(), () if custody is None else custody.steady
        try:
            unit: Unit | None = await in_thread(self._manager.ask)
        except (QmpError, MemoryError):
            unit = None
        self._seen, self._asked = seen, monotonic()
        missing = 0
        if custody is not None and unit is not None:
            custody.allow(unit.limit, unit.nofile)
            if steady and steady == custody.steady:
                missing = max(0, custody.room[0] - unit.stored)
            else:  # what it held is not what it is to hold now: ask again soon
                self._asked -= FRESH - TICK
                missing = keeping.missing
        self._gmemd.keeping = keeping._replace(unit=unit, missing=missing)
        return unit, missing

    async def _give_again(self, *, wholly: bool) -> None:
        custody = self._gmemd.custody
        assert custody is not None
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def settled() -> None:
            if not done.done():
                done.set_result(None)

        custody.give_again(partial(_entries, self._gmemd), wholly=wholly)
        self._gmemd.settle([], settled)
        await done

def _entries(gmemd: Gmemd) -> Iterator[tuple[str, int]]:
    """All that the manager is to hold, by the name in its store."""
    for backend in list(gmemd.objects):
        for record, fd in ((backend.record, backend.fd), (backend.private_record, backend.private_fd)):
            if record is not None and record.fd_name and fd >= 0:
                yield record.fd_name, fd
    yield from list(gmemd.unclaimed)
