"""One state of the status page: its sections and rows as HTML, made anew only where something has changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import islice
from typing import Any, Final
from urllib.parse import urlencode

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.pace import Pace
from gmemd.posix.boottime import on_the_wall
from gmemd.processes.holders import Holder
from gmemd.web import sections
from gmemd.web.state import State
from gmemd.web.strip import measure_strip

ROWS: Final = 50  # objects on a page
EVENTS: Final = 12
FRESH: Final = 0.9  # seconds that a measurement of what is shown is good for
_CACHED: Final = 1000  # rows


@dataclass(frozen=True)
class Picture:
    """What the page shows. `sections` by the id of their element, `rows` by object in the order of the table."""

    sections: dict[str, str]
    rows: dict[str, str]
    total: int  # objects that the search has found
    page: int
    pages: int


class Painter:
    """Makes pictures; all who look share its rows."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._rows: dict[str, tuple[Any, str]] = {}  # what a row was made from, and the row

    async def paint(self, given: dict[str, Any], patience: float) -> Picture:
        """The page that the parameters of the route ask for.

        Totals and holders that take longer than `patience` seconds are left for a later picture.
        """
        state, gmemd = self._state, self._state.gmemd
        found = await state.objects(given["q"], given["sort"])
        pages = max(1, -(-len(found) // ROWS))
        page = min(given["page"], pages)
        shown = found[(page - 1) * ROWS:page * ROWS]
        totals = await state.measurer.sweep(patience)
        rows = await self._paint_rows(shown, patience)
        sums = gmemd.objects.sums.values()
        host = await state.host.read()
        jobs = await state.query("query-jobs") if "query-jobs" in gmemd.schema.commands else []
        return Picture({
            "summary": sections.summary(gmemd, len(gmemd.objects), sum([size for _, size in sums]), totals,
                                        state.why_not_ready()),
            "warnings": sections.warnings(gmemd),
            "host": sections.host_bar(host, totals),
            "jobs": sections.jobs(jobs),
            "events": sections.events(list(islice(reversed(gmemd.events), EVENTS))),
            "paging": paging(given, len(found), page, pages),
        }, rows, len(found), page, pages)

    async def _paint_rows(self, shown: Sequence[HostMemoryBackend], patience: float) -> dict[str, str]:
        state = self._state
        await state.measurer.measure(shown, FRESH)
        held = await state.holders.find_soon(shown, patience)
        if len(self._rows) > _CACHED:
            self._rows.clear()
        rows, pace = {}, Pace()
        for backend in shown:
            holders = held.get(backend.id)
            key = self._key(backend, holders)
            known = self._rows.get(backend.id)
            if known is None or known[0] != key:
                known = self._rows[backend.id] = (key, await self._paint_row(backend, holders))
            rows[backend.id] = known[1]
            await pace.keep()
        return rows

    async def _paint_row(self, backend: HostMemoryBackend, holders: list[Holder] | None) -> str:
        gmemd, measurer = self._state.gmemd, self._state.measurer
        cells = []
        if backend.fd >= 0:  # else it was deleted meanwhile
            cells = await measure_strip(backend, measurer, await measurer.page_size(backend))
        return sections.row(gmemd, backend, measurer.last(backend), cells, holders)

    def _key(self, backend: HostMemoryBackend, holders: list[Holder] | None) -> Any:
        """All that a row depends on."""
        known = self._state.measurer.last(backend)
        return (id(backend), int(on_the_wall(backend.made)), backend.handed_out, backend.busy, backend.record is None,
                None if known is None else (known.private, known.shared, known.known),
                None if backend.visibility is None else hash(tuple(backend.visibility.dump())),
                None if holders is None else tuple([str(holder) for holder in holders]))


def paging(given: dict[str, Any], total: int, page: int, pages: int) -> str:
    """Where in the list of objects the page is, and the way to the others."""
    first, last = (page - 1) * ROWS + 1, min(page * ROWS, total)
    text = f"{first:,} to {last:,} of {total:,}" if total else "No objects"
    rest = {name: given[name] for name, usual in (("q", ""), ("sort", "created")) if given[name] != usual}

    def link(number: int, word: str, relation: str) -> str:
        if not 1 <= number <= pages or number == page:
            return f'<span aria-hidden="true">{word}</span>'
        target = escape(urlencode({**rest, "page": number}))
        return f'<a id="{relation}" rel="{relation}" href="?{target}">{word}</a>'

    links = (link(1, "First", "first") + link(page - 1, "Previous", "prev") + link(page + 1, "Next", "next")
             + link(pages, "Last", "last")) if pages > 1 else ""
    return f'<span role="status">{text}</span>{links}'
