"""What each owner, each kind and all objects together occupy, and how that compares with the kernel's figures.

It is measured and added up in worker threads, so nobody else waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.pace import Pace
from gmemd.changes.threads import in_thread
from gmemd.commands.context import Caller, Gmemd
from gmemd.commands.listing import SHORT, in_turns
from gmemd.commands.measure import kind_of, measured
from gmemd.commands.templates import home_of_template
from gmemd.errors import os_errors
from gmemd.kernel.affinity import online_nodes
from gmemd.kernel.hugepages import HugePool
from gmemd.kernel.kernel import Kernel
from gmemd.memory.usage import Entry, Ledger, Usage, total
from gmemd.objects.names import IN_THE_HOUSE

PROC = "/proc"


class _Row(NamedTuple):
    """An object in the sums."""

    uid: int
    kind: str
    policy: str
    nodes: list[int]
    entry: Entry
    clones: bool  # it is a clone, or a template that has some


def query_memdev_accounting(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Coroutine[Any, Any, Any]:
    listed = gmemd.seen() if arguments["objects"] else []
    if "after" in arguments:
        after = gmemd.objects.find(arguments["after"])
        listed = listed[listed.index(after) + 1:] if listed else []
    return _account(gmemd, listed, arguments["objects"])


async def _account(gmemd: Gmemd, listed: list[HostMemoryBackend], wanted: int) -> Any:
    """The answer, listing the requested number of objects."""
    rows: dict[HostMemoryBackend, _Row] = {}
    there = gmemd.by_age()
    cloned = {(home_of_template(gmemd, one), one.template.removeprefix(IN_THE_HOUSE)) for one in there
              if one.template}
    async for found in measured(gmemd, there, Ledger(gmemd.kernel).enter):
        rows.update({backend: _row(backend, entry, cloned) for backend, entry in found})
    with os_errors("cannot read the machine's memory"):
        sums: dict[str, Any] = await in_thread(_add_up, gmemd.kernel, list(rows.values()))
    shown = [(backend, rows[backend]) for backend in listed if backend in rows][:wanted]
    entries = (_entry(gmemd.called(backend), backend, row) for backend, row in shown)
    if len(shown) > SHORT:
        return await in_turns(entries, Pace(), **sums, list=...)
    return {**sums, "list": list(entries)}


def _row(backend: HostMemoryBackend, entry: Entry, cloned: Collection[tuple[Any, str]]) -> _Row:
    """`cloned`: the templates that have clones, by where they are and id."""
    properties = backend.properties
    return _Row(backend.owner[0], kind_of(backend), properties["policy"], properties["host-nodes"], entry,
                bool(backend.template) or (backend.frozen and (backend.home, backend.id) in cloned))


def _add_up(kernel: Kernel, rows: list[_Row]) -> dict[str, Any]:
    """The sums, in which shared memory counts once, and the machine's figures."""
    rows = [row for row in rows if row.entry.size]
    online, pools = online_nodes(), kernel.huge_pools()
    kinds = _grouped(rows, "kind", lambda row: row.kind)
    return {
        **_sum(rows),
        "owners": _grouped(rows, "uid", lambda row: row.uid),
        "kinds": kinds,
        "nodes": _grouped(rows, "node", lambda row: placement(row.policy, row.nodes, online)),
        "headroom": [one._asdict() for one in kernel.headrooms()],
        "huge-pages": [_pool(pool) for pool in pools],
        "compared": comparisons({entry["kind"]: _usage(entry) for entry in kinds}, kernel.guest_counter, machine(),
                                pools),
    }


def _sum(rows: Sequence[_Row]) -> dict[str, int]:
    occupied = total([row.entry.share for row in rows])
    return {"objects": len(rows), "size": sum([row.entry.size for row in rows]), **occupied._asdict(),
            **_divided(occupied, sum([row.entry.share.resident for row in rows if row.clones]))}


def _divided(usage: Usage, common: int) -> dict[str, int]:
    """What is in memory, as what belongs to one object, and what a template and its clones have in common."""
    return {"unique": usage.resident - common, "common": common}


def _grouped(rows: Sequence[_Row], name: str, key: Callable[[_Row], Any]) -> list[dict[str, Any]]:
    """The sums of each group, the largest first; the member `name` is absent where the key is None."""
    groups: dict[Any, list[_Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    sums = [({} if value is None else {name: value}) | _sum(members) for value, members in groups.items()]
    return sorted(sums, key=lambda entry: -entry["resident"])


def _usage(entry: dict[str, Any]) -> Usage:
    return Usage(**{name: entry[name] for name in Usage._fields})


def _entry(name: str, backend: HostMemoryBackend, row: _Row) -> dict[str, Any]:
    return {"id": name, "uid": row.uid, "kind": row.kind, "size": backend.memory_size,
            **row.entry.usage._asdict(), **_divided(row.entry.usage, row.entry.usage.resident * row.clones)}


def _pool(pool: HugePool) -> dict[str, Any]:
    node = {} if pool.node is None else {"node": pool.node}
    return {"page-size": pool.page_size, **node, "total": pool.total, "free": pool.free, "reserved": pool.reserved,
            "surplus": pool.surplus}


def machine(proc: str = PROC) -> dict[str, int]:
    """The machine's figures, in bytes, by their names in meminfo."""
    with open(f"{proc}/meminfo") as lines:
        return {row[0].rstrip(":"): int(row[1]) << 10 for row in map(str.split, lines) if row[-1] == "kB"}


def comparisons(by_kind: Mapping[str, Usage], guest_counter: str, figures: Mapping[str, int],
                pools: Iterable[HugePool]) -> list[dict[str, Any]]:
    """Our sums next to the kernel's, which must not be less, because they include other memory.

    guest_counter: the machine's figure that counts guest_memfds.
    """
    memory, guest = by_kind.get("memfd", Usage()), by_kind.get("guest-memfd", Usage())
    ours = {"Shmem": memory.resident + memory.aside + guest.aside}
    ours[guest_counter] = ours.get(guest_counter, 0) + guest.resident
    found = [_compared(name, amount, figures.get(name, 0)) for name, amount in ours.items()]
    used = sum((pool.total - pool.free) * pool.page_size for pool in pools if pool.node is None)
    found.append(_compared("huge pages in use", by_kind.get("hugetlb-memfd", Usage()).resident, used))
    return found


def _compared(what: str, ours: int, kernel: int) -> dict[str, Any]:
    return {"what": what, "objects": ours, "kernel": kernel, "drift": max(0, ours - kernel)}


def placement(policy: str, nodes: list[int], online: list[int]) -> int | None:
    """The node of all of an object's pages; None if that is unknown without mapping them."""
    if len(online) == 1:
        return online[0]
    return nodes[0] if policy == "bind" and len(nodes) == 1 else None
