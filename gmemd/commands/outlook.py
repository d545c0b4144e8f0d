"""Know which manager keeps the memory, and what it really keeps, as long as the daemon runs.

systemd is asked after the start, whenever it may have been reloaded, and periodically; what it has dropped, for example
because the unit file was missing at a reload, this process still has and stores again.
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
from gmemd.persist.liveupdate import holes
from gmemd.persist.unit import mark

TICK: Final = 2.0  # seconds between two checks whether systemd has been reloaded
RENEWED: Final = 20.0  # seconds after which it is asked in any case
FRESH: Final = 30.0  # seconds that an answer is valid
_RECKONED: Final = 1.0  # seconds that the sum of all holes is valid
PATIENCE: Final = 2.0  # seconds that a command waits for an answer


def _log(words: str) -> None:
    log.warning("service manager", words=words)


class Manager(Protocol):
    """The service manager, as far as it is used here."""

    @property
    def keeping(self) -> Keeping:
        """What was known about it at start."""
        ...

    def ask(self) -> Unit | None:
        """What systemd reports for the service; None if it does not answer. Blocks."""
        ...

    def status_changed(self) -> None:
        """Update the status soon."""
        ...


class Unmanaged:
    """The manager if there is none."""

    keeping: Final = Keeping()

    def ask(self) -> Unit | None: ...

    def status_changed(self) -> None: ...


class Outlook:
    """What is known about the manager. `entries` yields everything that it is to hold, by the names in its store."""

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
        self._seen = 0  # the mark when systemd was last asked
        self._asked = -FRESH  # when that was, monotonic seconds
        self._looking: asyncio.Task[None] | None = None
        self._told = ""
        self._filled = -_RECKONED  # when the holes of all memory were added up, monotonic seconds
        self._before = 0  # custody's copy_due at the tick before

    @property
    def live_update(self) -> bool:
        """Whether the kernel was started so that it can carry memory across a kexec."""
        return self._keeping.live_update

    def start(self) -> None:
        """Check now, and periodically as long as the loop runs."""
        self._custody.copies.ask(self._entries)
        if self._keeping.manager == "systemd":
            self._tick()

    def is_stale(self, after: float = FRESH) -> bool:
        """Whether systemd's answer may be different by now; `after`: seconds."""
        if self._keeping.manager != "systemd":
            return False
        mark = self._mark()
        return mark != self._seen or monotonic() - self._asked >= (after if mark else TICK)

    def must_look(self) -> bool:
        """Whether an answer of systemd must be waited for."""
        return self.is_stale() or (self._looking is not None and not self._looking.done())

    def keeping(self) -> Keeping:
        """Which manager keeps what, as far as it is known now."""
        if self.live_update and monotonic() - self._filled >= _RECKONED:
            self._filled, filling = monotonic(), holes(fd for _, fd in self._entries())
            available = self._settler.kernel.headrooms()[0].available
            self._keeping = self._keeping._replace(filling=filling, available=available)
        return self._keeping._replace(held=self._custody.room[0], copied=self._custody.copies.stored,
                                      unit=None if self.is_stale() else self._keeping.unit)

    async def look(self) -> None:
        """Ask, once for all simultaneous callers, until the answer is fresh; but do not wait long."""
        end = monotonic() + self._patience
        while self.must_look() and (left := end - monotonic()) > 0:
            if self._looking is None or self._looking.done():
                self._looking = asyncio.get_running_loop().create_task(self._look())
            await asyncio.wait({self._looking}, timeout=left)

    def _tick(self) -> None:
        if self.is_stale(RENEWED):
            self._asked = min(self._asked, monotonic() - FRESH)
            self._spawn(self.look())
        self._carry()
        asyncio.get_running_loop().call_later(TICK, self._tick)

    def _carry(self) -> None:
        """Have the registry's copy renewed when nothing has changed for one tick."""
        due = self._custody.copies.due
        if due and due == self._before:
            self._custody.copies.ask(self._entries)
            self._settler.settle([], lambda: None)
        self._before = due

    async def _look(self) -> None:
        unit, missing = await self._ask()
        if unit is not None and missing and unit.stored < unit.limit:
            before = missing
            await self._give_again(wholly=unit.stored == 0)
            unit, missing = await self._ask()
            if not missing:
                self._tell(f"systemd had dropped {before} descriptors; they were stored again")
        words = self._trouble(unit, missing)
        if words and words != self._told:
            self._tell(words)
        self._told = words

    def _trouble(self, unit: Unit | None, missing: int) -> str:
        """What the operator should know; "" if all is well."""
        if unit is None and self._custody.keeps and self._keeping.old:
            return (f"systemd does not say how many descriptors it keeps, and could not be asked: "
                    f"{self._custody.room[1]} are assumed (set GMEMD_FDSTORE if the number is another one)")
        if unit is None or not missing:
            return ""
        return f"systemd does not hold {missing} descriptors: raise FileDescriptorStoreMax= (it is {unit.limit})"

    async def _ask(self) -> tuple[Unit | None, int]:
        """What systemd reports, and how many descriptors it should hold and does not."""
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
            else:  # what it is to hold has changed meanwhile: ask again soon
                self._asked -= FRESH - TICK
                missing = self._keeping.missing
        self._keeping = self._keeping._replace(unit=unit, missing=missing)
        return unit, missing

    async def _give_again(self, *, wholly: bool) -> None:
        assert self._custody.keeps
        self._custody.give_again(self._entries, wholly=wholly)
        await self._settler.flush()
