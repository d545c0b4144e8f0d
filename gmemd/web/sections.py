"""The parts of the status page that change, each as HTML: host, objects, jobs, events, warnings."""

from __future__ import annotations

import os
from html import escape
from typing import Any, Final
from urllib.parse import urlencode

from gmemd.backends.base import HostMemoryBackend
from gmemd.commands.context import Gmemd
from gmemd.commands.measure import Sweep
from gmemd.commands.status import describe_survival
from gmemd.kernel.hugepages import HugePool
from gmemd.memory.cells import Cell
from gmemd.memory.ranges import PRIVATE
from gmemd.memory.usage import Usage
from gmemd.posix.boottime import on_the_wall
from gmemd.processes.holders import Holder
from gmemd.web.host import Host
from gmemd.web.strip import strip
from gmemd.web.words import EVENTS, bar, exactly, members, moment, percent, plural, size

ROWS: Final = 50  # objects on a page


def summary(gmemd: Gmemd, number: int, total_size: int, sweep: Sweep | None, why_not_ready: str) -> str:
    """The figures at the top."""
    resident = "…" if sweep is None else exactly(sweep.usage.occupied)
    if sweep is not None and sweep.usage.unknown:
        resident += f"<small>{plural(sweep.usage.unknown, 'object')} not measured</small>"
    ready = ('<span class="good">ready</span>' if not why_not_ready
             else f'<span class="bad">not ready: {escape(why_not_ready)}</span>')
    restart = "objects stay" if gmemd.custody.keeps else "objects end"
    return (f'<div><dt>Daemon</dt><dd>{ready}</dd></div>'
            f'<div><dt>Objects</dt><dd>{number:,}</dd></div>'
            f'<div><dt>Size</dt><dd>{exactly(total_size)}</dd></div>'
            f'<div><dt>In memory</dt><dd>{resident}</dd></div>'
            f'{_snapshots(gmemd)}'
            f'<div><dt>guest_memfd</dt><dd>{escape(gmemd.kernel.name)}<small>{escape(gmemd.kernel.why)}</small></dd></div>'
            f'<div><dt>On restart</dt><dd>{restart}</dd></div>')


def _snapshots(gmemd: Gmemd) -> str:
    """The figure about snapshots, if there are any."""
    known = gmemd.known_snapshots()
    if not known:
        return ""
    checkpoints = sum("device-state" in entry.manifest for entry in known)
    of_these = f", {plural(checkpoints, 'checkpoint')} of these" if checkpoints else ""
    occupied = exactly(sum([entry.bytes for entry in known]))
    return f'<div><dt>Snapshots</dt><dd>{len(known):,}<small>{occupied} on the disk{of_these}</small></dd></div>'


def warnings(gmemd: Gmemd) -> str:
    """What needs the operator's attention, or ""."""
    rows = []
    if lost := [room.named(object_id) for room in gmemd.seen_rooms() for object_id in room.lost]:
        rows.append(f"{plural(len(lost), 'object')} lost: only the record came back "
                    f"({escape(', '.join(lost[:10]))}). object-del frees the id.")
    if gmemd.unclaimed:
        rows.append(f"{plural(len(gmemd.unclaimed), 'descriptor')} came back without a record: "
                    "see query-memdev-unclaimed and memdev-claim.")
    if bad := [entry for entry in gmemd.known_snapshots() if entry.problem]:
        rows.append(f"{plural(len(bad), 'snapshot')} cannot be used: {escape(bad[0].problem)}"
                    f"{' and others' if len(bad) > 1 else ''}.")
    return "".join(f"<p>{row}</p>" for row in rows)


def host_bar(host: Host, sweep: Sweep | None) -> str:
    """Memory of the host, and its huge pages by node."""
    parts = []
    if host.headroom is not None:
        total, available = host.headroom.total, host.headroom.available
        used = max(0, total - available)
        ours = 0 if sweep is None else min(used, sweep.usage.occupied)
        text = (f"{size(ours)} by objects, {size(used - ours)} by others, {size(available)} available "
                f"of {size(total)} ({host.headroom.limit})")
        parts.append(f'<div class="meter"><h3>Memory</h3>'
                     f'{bar([("ours", ours), ("others", used - ours), ("rest", available)], total, text)}'
                     f'<p class="key"><span><i class="ours"></i>objects {exactly(ours)}</span>'
                     f'<span><i class="others"></i>others {exactly(used - ours)}</span>'
                     f'<span><i class="rest"></i>available {exactly(available)} of {exactly(total)}, '
                     f'{escape(host.headroom.limit)}</span></p></div>')
    pools = [pool for pool in host.pools if pool.total]
    parts += map(_pool, [pool for pool in pools if pool.node is not None] or pools)  # the machine's if it has no nodes
    if not pools:
        parts.append('<p class="none">No huge pages are configured.</p>')
    return "".join(parts)


def _pool(pool: HugePool) -> str:
    where = "" if pool.node is None else f", node {pool.node}"
    used = pool.total - pool.free
    text = f"{used} of {pool.total} used, {pool.free} free"
    return (f'<div class="meter"><h3>Huge pages of {size(pool.page_size)}{where}</h3>'
            f'{bar([("others", used), ("rest", pool.free)], pool.total, text)}<p class="key">{text}</p></div>')


def row(gmemd: Gmemd, backend: HostMemoryBackend, known: Usage | None, cells: list[Cell],
        holders: list[Holder] | None) -> str:
    """An object's row of the table."""
    name = escape(gmemd.called(backend))
    stand_in = backend.kind == "guest-memfd" and gmemd.kernel.simulated
    tag = ' <small class="tag" title="backed by a memfd">simulated</small>' if stand_in else ""
    busy = f'<small class="tag busy">{escape(backend.busy)}</small>' if backend.busy else ""
    kind = escape(backend.qom_type.removeprefix("memory-backend-"))
    return (f'<tr id="o-{name}" data-id="{name}"><th scope="row">{name}<small>{kind}</small>{busy}</th>'
            f'<td data-label="Memory">{exactly(backend.memory_size)}<small>{escape(backend.kind)}{tag}</small></td>'
            f'<td data-label="In memory">{_resident(backend, known)}</td>'
            f'<td data-label="Pages" class="pages">{strip(cells)}{_visibility(backend)}</td>'
            f'<td data-label="Held by">{_holders(gmemd, backend, holders)}{_runner(backend)}</td>'
            f'<td data-label="Survives">{_survival(gmemd, backend)}</td>'
            f'<td data-label="Created">{moment(on_the_wall(backend.made))}<small>{_owner(backend)}</small></td></tr>')


def _resident(backend: HostMemoryBackend, known: Usage | None) -> str:
    if known is None:
        return '<span class="none">unknown</span>'
    return f"{exactly(known.occupied)}<small>{percent(known.occupied, backend.memory_size)}</small>"


def _visibility(backend: HostMemoryBackend) -> str:
    if backend.visibility is None:
        return "<small>shared with every holder</small>"
    private = backend.visibility.total(PRIVATE)
    number = len(backend.visibility)
    ranges = f" in {plural(number, 'range')}" if number > 1 else ""
    return f"<small>{size(private)} private, {size(backend.memory_size - private)} shared{ranges}</small>"


def _holders(gmemd: Gmemd, backend: HostMemoryBackend, holders: list[Holder] | None) -> str:
    if holders is None:
        return '<span class="none">…</span>'
    keeper = {"keeper": os.getppid(), "systemd": 1}.get(gmemd.outlook.keeping().manager)
    holders = [holder for holder in holders if holder.pid != keeper]  # _survival says what it is for
    if not holders:
        handed_out = f"handed out {plural(backend.handed_out, 'time')}" if backend.handed_out else "never handed out"
        return f'<span class="none">nobody</span><small>{handed_out}</small>'
    items = "".join(f"<li>{escape(holder.comm)} <small>pid {holder.pid}, uid {holder.uid}, "
                    f"{size(holder.mapped) + ' mapped' if holder.mapped else plural(holder.fds, 'descriptor')}"
                    f"{'' if holder.writable else ', read-only'}{', private copy' if holder.private_copy else ''}"
                    f"</small></li>" for holder in holders[:20])
    more = f"<li>and {len(holders) - 20} more</li>" if len(holders) > 20 else ""
    first = escape(holders[0].comm) + (f" and {len(holders) - 1} more" if len(holders) > 1 else "")
    return f'<details data-key="held"><summary>{first}</summary><ul>{items}{more}</ul></details>'


def _runner(backend: HostMemoryBackend) -> str:
    """Who runs a guest on it, and how often one began to."""
    if not backend.generation:
        return ""
    who = "no guest now" if backend.runner is None else f"guest in pid {backend.runner.pid}"
    return f"<small>{who}, generation {backend.generation}</small>"


def _survival(gmemd: Gmemd, backend: HostMemoryBackend) -> str:
    fates = describe_survival(gmemd, backend)
    survived = sum(fate["survives"] for fate in fates)
    dots = "".join(f'<circle class="{"yes" if fate["survives"] else "no"}" cx="{6 + 12 * place}" cy="6" r="4"/>'
                   for place, fate in enumerate(fates))
    items = "".join(
        f'<li class="{"yes" if fate["survives"] else "no"}">{EVENTS.get(fate["event"], escape(fate["event"]))}'
        + (f"<small>{escape(fate['advice'])}</small>" if "advice" in fate else "") + "</li>" for fate in fates)
    return ('<details data-key="survives"><summary>'
            f'<svg class="dots" viewBox="0 0 {12 * len(fates)} 12" aria-hidden="true">{dots}</svg> '
            f'{survived} of {len(fates)}</summary><ul class="fates">{items}</ul></details>')


def _owner(backend: HostMemoryBackend) -> str:
    uid, pid = backend.owner
    return f"by pid {pid}, uid {uid}" if pid >= 0 else "owner unknown"


def paging(given: dict[str, Any], total: int, page: int, pages: int) -> str:
    """The page's position in the list of objects, and links to the others."""
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


def jobs(found: list[dict[str, Any]]) -> str:
    if not found:
        return '<p class="none">No jobs.</p>'
    rows = []
    for job in found:
        current, total = job["current-progress"], job["total-progress"]
        name = escape(job["id"])
        error = f'<small class="bad">{escape(job["error"])}</small>' if "error" in job else ""
        rows.append(f'<tr><th scope="row">{name}<small>{escape(str(job["type"]))}</small></th>'
                    f'<td data-label="Status">{escape(str(job["status"]))}{error}</td>'
                    f'<td data-label="Progress"><progress value="{current}" max="{max(1, total)}" '
                    f'aria-label="progress of {name}"></progress> {percent(current, total)}</td></tr>')
    return ('<div class="scroll"><table><thead><tr><th scope="col">Job</th><th scope="col">Status</th>'
            f'<th scope="col">Progress</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>')


def events(found: list[tuple[float, str, dict[str, Any]]]) -> str:
    if not found:
        return '<p class="none">No events since start.</p>'
    rows = "".join(f'<tr><td data-label="When">{moment(when)}</td><th scope="row">{escape(name)}</th>'
                   f'<td data-label="Data" class="members">{members(data)}</td></tr>' for when, name, data in found)
    return ('<div class="scroll"><table><thead><tr><th scope="col">When</th><th scope="col">Event</th>'
            f'<th scope="col">Data</th></tr></thead><tbody>{rows}</tbody></table></div>')
