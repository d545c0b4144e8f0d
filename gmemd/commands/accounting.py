"""The command that shows the bill. It measures and adds up in worker threads, so that nobody waits for it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.pace import Pace
from gmemd.changes.threads import in_thread
from gmemd.commands.context import Caller, Gmemd
from gmemd.commands.listing import SHORT, in_turns
from gmemd.commands.measure import kind_of, measured
from gmemd.errors import os_errors
from gmemd.kernel.headroom import Headroom
from gmemd.kernel.hugepages import HugePool
from gmemd.kernel.kernel import Kernel
from gmemd.memory.usage import Entry, Ledger, Usage, comparisons, machine, online_nodes, placement, total


class _Row(NamedTuple):
    """An object on the bill."""

    uid: int
    kind: str
    policy: str
    nodes: list[int]
    entry: Entry


def query_memdev_accounting(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Coroutine[Any, Any, Any]:
    listed = list(gmemd.objects) if arguments["objects"] else []
    if "after" in arguments:
        after = gmemd.objects.find(arguments["after"])
        listed = listed[listed.index(after) + 1:] if listed else []
    return _account(gmemd, listed, arguments["objects"])


async def _account(gmemd: Gmemd, listed: list[HostMemoryBackend], wanted: int) -> Any:
    """The bill, with as many of the objects listed as are wanted."""
    rows: dict[HostMemoryBackend, _Row] = {}
    async for found in measured(gmemd, gmemd.objects.in_creation_order(), Ledger(gmemd.kernel).enter):
        rows.update({backend: _row(backend, entry) for backend, entry in found})
    with os_errors("cannot read the machine's memory"):
        bill: dict[str, Any] = await in_thread(_add_up, gmemd.kernel, list(rows.values()))
    shown = [(backend, rows[backend]) for backend in listed if backend in rows][:wanted]
    entries = (_entry(*one) for one in shown)
    if len(shown) > SHORT:
        return await in_turns(entries, Pace(), **bill, list=...)
    return {**bill, "list": list(entries)}


def _row(backend: HostMemoryBackend, entry: Entry) -> _Row:
    properties = backend.properties
    return _Row(backend.owner[0], kind_of(backend), properties["policy"], properties["host-nodes"], entry)


def _add_up(kernel: Kernel, rows: list[_Row]) -> dict[str, Any]:
    """The sums, in which memory counts once that several objects have, beside what the machine says."""
    rows = [row for row in rows if row.entry.size]
    online, pools = online_nodes(), kernel.huge_pools()
    kinds = _grouped(rows, "kind", lambda row: row.kind)
    return {
        **_sum(rows),
        "owners": _grouped(rows, "uid", lambda row: row.uid),
        "kinds": kinds,
        "nodes": _grouped(rows, "node", lambda row: placement(row.policy, row.nodes, online)),
        "headroom": [_headroom(one) for one in kernel.headrooms()],
        "huge-pages": [_pool(pool) for pool in pools],
        "compared": comparisons({entry["kind"]: _usage(entry) for entry in kinds}, kernel.guest_counter, machine(),
                                pools),
    }


def _sum(rows: Sequence[_Row]) -> dict[str, int]:
    occupied = total([row.entry.share for row in rows])
    return {"objects": len(rows), "size": sum([row.entry.size for row in rows]), **occupied.describe()}


def _grouped(rows: Sequence[_Row], name: str, key: Callable[[_Row], Any]) -> list[dict[str, Any]]:
    """The sums of each group, the largest first; the member `name` is absent where the key is None."""
    groups: dict[Any, list[_Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    sums = [({} if value is None else {name: value}) | _sum(members) for value, members in groups.items()]
    return sorted(sums, key=lambda entry: -entry["resident"])


def _usage(entry: dict[str, Any]) -> Usage:
    return Usage(**{name: entry[name] for name in Usage._fields})


def _entry(backend: HostMemoryBackend, row: _Row) -> dict[str, Any]:
    return {"id": backend.id, "uid": row.uid, "kind": row.kind, "size": backend.memory_size,
            **row.entry.usage.describe()}


def _pool(pool: HugePool) -> dict[str, Any]:
    node = {} if pool.node is None else {"node": pool.node}
    return {"page-size": pool.page_size, **node, "total": pool.total, "free": pool.free, "reserved": pool.reserved,
            "surplus": pool.surplus}


def _headroom(one: Headroom) -> dict[str, Any]:
    return {"available": one.available, "total": one.total, "limit": one.limit}
