"""Know who keeps the memory, and what it really keeps, for as long as the daemon runs.

systemd is asked after the start, whenever it may have been reloaded, and now and then; what it has let go of, as it
does when the unit file is missing at a reload, this process still has, and it is given again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from time import monotonic
from typing import Any, Final, Protocol

from gmemd.changes.settling import Settler
from gmemd.changes.threads import in_thread
from gmemd.errors import QmpError
from gmemd.observe.log import log
from gmemd.persist.keeping import Keeping, Unit
from gmemd.persist.unit import mark

TICK: Final = 2.0  # seconds between two looks at whether systemd has been reloaded
RENEWED: Final = 20.0  # seconds after which it is asked if it has not
FRESH: Final = 30.0  # seconds for which an answer is believed
PATIENCE: Final = 2.0  # seconds for which a command waits for an answer


def _log(words: str) -> None:
    log.warning("service manager", words=words)


class Manager(Protocol):
    """The service manager, as far as it is asked here."""

    @property
    def keeping(self) -> Keeping:
        """What was known of it at start."""
        ...

    def ask(self) -> Unit | None:
        """What systemd says of the service; None where it does not answer. Blocks."""
        ...

    def status_changed(self) -> None:
        """Show soon what is held now."""
        ...


class Unmanaged:
    """Where there is none."""

    keeping: Final = Keeping()

    def ask(self) -> Unit | None: ...

    def status_changed(self) -> None: ...


class Outlook:
    """What is known of the manager. `entries` gives all that it is to hold, by the names in its store."""

    def __init__(self, settler: Settler, manager: Manager, spawn: Callable[[Coroutine[Any, Any, None]], None],
                 entries: Callable[[], Iterator[tuple[str, int]]], *, tell: Callable[[str], None] = _log,
                 mark: Callable[[], int] = mark, patience: float = PATIENCE) -> None:
        self._settler = settler
        self._custody = settler.custody
        self._manager = manager
        self._keeping = manager.keeping
        self._spawn = spawn
        self._entries = entries
        self._tell = tell  # the operator
        self._mark = mark
        self._patience = patience
        self._seen = 0  # the mark when systemd was asked last
        self._asked = -FRESH  # when that was, monotonic seconds
        self._looking: asyncio.Task[None] | None = None
        self._told = ""

    def start(self) -> None:
        """Look now, and again for as long as the loop runs."""
        if self._keeping.manager == "systemd":
            self._tick()

    def is_stale(self, after: float = FRESH) -> bool:
        """Whether systemd may say something else by now; `after`: seconds."""
        if self._keeping.manager != "systemd":
            return False
        mark = self._mark()
        return mark != self._seen or monotonic() - self._asked >= (after if mark else TICK)

    def must_look(self) -> bool:
        """Whether it has to be waited for what systemd says."""
        return self.is_stale() or (self._looking is not None and not self._looking.done())

    def keeping(self) -> Keeping:
        """Who keeps what, as far as it is known now."""
        return self._keeping._replace(held=self._custody.room[0],
                                      unit=None if self.is_stale() else self._keeping.unit)

    async def look(self) -> None:
        """Ask, once for all that want it at the same time, until what is known is fresh; but wait not for long."""
        end = monotonic() + self._patience
        while self.must_look() and (left := end - monotonic()) > 0:
            if self._looking is None or self._looking.done():
                self._looking = asyncio.get_running_loop().create_task(self._look())
            await asyncio.wait({self._looking}, timeout=left)

    def _tick(self) -> None:
        if self.is_stale(RENEWED):
            self._asked = min(self._asked, monotonic() - FRESH)
            self._spawn(self.look())
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
        if unit is None and self._custody.keeps and self._keeping.old:
            return (f"systemd does not say how many descriptors it keeps, and could not be asked: "
                    f"{self._custody.room[1]} are counted on (GMEMD_FDSTORE tells another number)")
        if unit is None or not missing:
            return ""
        return f"systemd does not hold {missing} descriptors: raise FileDescriptorStoreMax= (it is {unit.limit})"

    async def _ask(self) -> tuple[Unit | None, int]:
        """What systemd says, and how many descriptors it should hold and does not."""
        custody = self._custody
        seen, steady = self._mark(), custody.steady
        try:
            unit: Unit | None = await in_thread(self._manager.ask)
        except (QmpError, MemoryError):
            unit = None
        self._seen, self._asked = seen, monotonic()
        missing = 0
        if custody.keeps and unit is not None:
            custody.allow(unit.limit, unit.nofile)
            if steady and steady == custody.steady:
                missing = max(0, custody.room[0] - unit.stored)
            else:  # what it held is not what it is to hold now: ask again soon
                self._asked -= FRESH - TICK
                missing = self._keeping.missing
        self._keeping = self._keeping._replace(unit=unit, missing=missing)
        return unit, missing

    async def _give_again(self, *, wholly: bool) -> None:
        assert self._custody.keeps
        self._custody.give_again(self._entries, wholly=wholly)
        await self._settler.flush()
