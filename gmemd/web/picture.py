"""One state of the status page: its sections and rows as HTML, rendered again only where something has changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Final

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.pace import Pace
from gmemd.commands.jobs import described
from gmemd.commands.measure import measured
from gmemd.memory.cells import Cell, measure_cells
from gmemd.posix.boottime import on_the_wall
from gmemd.processes.holders import Holder
from gmemd.web import sections
from gmemd.web.quotas import quotas
from gmemd.web.state import State

EVENTS: Final = 12
JOBS: Final = 50  # of which there may be thousands
FRESH: Final = 0.9  # seconds that a measurement of what is shown is valid
_CACHED: Final = 1000  # rows


@dataclass(frozen=True)
class Picture:
    """What the page shows: `sections` by the id of their element, `rows` by object in the order of the table."""

    sections: dict[str, str]
    rows: dict[str, str]


class Painter:
    """Makes pictures; all viewers share its rows."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._rows: dict[str, tuple[Any, str]] = {}  # what a row was rendered from, and the row

    async def paint(self, given: dict[str, Any], patience: float) -> Picture:
        """The page for the parameters of the route.

        Totals and holders that take longer than `patience` seconds are left for a later picture.
        """
        state, gmemd = self._state, self._state.gmemd
        found = await state.objects(given["q"], given["sort"])
        pages = max(1, -(-len(found) // sections.ROWS))
        page = min(given["page"], pages)
        shown = found[(page - 1) * sections.ROWS:page * sections.ROWS]
        sweep = await state.measurer.sweep(patience)
        rows = await self._paint_rows(shown, patience)
        number, size = map(sum, zip(*gmemd.sums().values(), strict=True))
        host = await state.host.read()
        jobs = list(islice(described(gmemd), JOBS)) if "query-jobs" in gmemd.schema.commands else []
        return Picture({
            "summary": sections.summary(gmemd, number, size, sweep, state.why_not_ready()),
            "warnings": sections.warnings(gmemd),
            "host": sections.host_bar(host, sweep),
            "quotas": quotas(gmemd.ledger),
            "jobs": sections.jobs(jobs),
            "events": sections.events(list(islice(reversed(gmemd.events), EVENTS))),
            "paging": sections.paging(given, len(found), page, pages),
        }, rows)

    async def _paint_rows(self, shown: Sequence[HostMemoryBackend], patience: float) -> dict[str, str]:
        state, gmemd = self._state, self._state.gmemd
        await state.measurer.measure(shown, FRESH)
        held = await state.holders.find_soon(shown, patience)
        if len(self._rows) > _CACHED:
            self._rows.clear()
        rows: dict[str, str] = {}
        changed: dict[HostMemoryBackend, Any] = {}
        cells: dict[HostMemoryBackend, list[Cell]] = {}
        pace = Pace()
        for backend in shown:
            key, name = self._key(backend, held.get(backend)), gmemd.called(backend)
            known, rows[name] = self._rows.get(name, (None, ""))
            if known != key:
                changed[backend] = key
            await pace.keep()
        # One at a time: the longer a thread computes, the longer the event loop waits for the interpreter.
        async for found in measured(gmemd, changed, partial(measure_cells, gmemd.kernel), batch=1):
            cells.update(found)
        for backend, key in changed.items():
            name = gmemd.called(backend)
            rows[name] = sections.row(gmemd, backend, state.measurer.last(backend), cells.get(backend, []),
                                      held.get(backend))
            self._rows[name] = key, rows[name]
            await pace.keep()
        return rows

    def _key(self, backend: HostMemoryBackend, holders: list[Holder] | None) -> Any:
        """Everything that a row depends on."""
        known = self._state.measurer.last(backend)
        return (id(backend), int(on_the_wall(backend.made)), backend.handed_out, backend.busy, backend.record is None,
                backend.generation, backend.runner,
                known, None if backend.visibility is None else hash(tuple(backend.visibility.dump())), holders)
