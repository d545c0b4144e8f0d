"""The command that shows the bill. It measures in a worker thread, batch by batch, so that nobody waits for it."""

from __future__ import annotations

import os
from collections.abc import Coroutine
from typing import Any, Final

from gmemd.accounting import Item, Usage, comparisons, machine, measure, online_nodes, placement, total
from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.threads import in_thread
from gmemd.commands.context import Caller, Gmemd
from gmemd.errors import close_fd, os_errors
from gmemd.kernel.base import Headroom, HugePool, Kernel

_BATCH: Final = 200  # objects that are measured by one thread, on duplicates of their fds


def query_memdev_accounting(gmemd: Gmemd, caller: Caller,
                            arguments: dict[str, Any]) -> Coroutine[Any, Any, dict[str, Any]]:
    if "after" in arguments:
        gmemd.objects.find(arguments["after"])
    return _account(gmemd, arguments["objects"], arguments.get("after"))


async def _account(gmemd: Gmemd, wanted: int, after: str | None) -> dict[str, Any]:
    backends = list(gmemd.objects)
    usages = await measure_all(gmemd, backends)
    counted = [backend for backend in backends if backend.id in usages]
    begin = next((place + 1 for place, backend in enumerate(counted) if backend.id == after), 0)
    with os_errors("cannot read the machine's memory"):
        host = await in_thread(_host, gmemd.kernel)
    distinct = _distinct(counted)
    kinds = _grouped(distinct, usages, "kind", _kind)
    return {
        **_sum(distinct, usages),
        "owners": _grouped(distinct, usages, "uid", lambda backend: backend.owner[0]),
        "kinds": kinds,
        "nodes": _grouped(distinct, usages, "node", lambda backend: placement(
            backend.properties["policy"], backend.properties["host-nodes"], host["online"])),
        "list": [_entry(backend, usages[backend.id]) for backend in counted[begin:begin + wanted]],
        "headroom": [_headroom(one) for one in host["headroom"]],
        "huge-pages": [_pool(pool) for pool in host["pools"]],
        "compared": comparisons(
            {entry["kind"]: _usage(entry) for entry in kinds}, gmemd.kernel.guest_counter, host["machine"],
            host["pools"]),
    }


async def measure_all(gmemd: Gmemd, backends: list[HostMemoryBackend]) -> dict[str, Usage]:
    """What each object occupies, by id; those that are deleted meanwhile are left out."""
    found: dict[str, Usage] = {}
    for begin in range(0, len(backends), _BATCH):
        batch = [backend for backend in backends[begin:begin + _BATCH] if backend.fd >= 0]
        with os_errors("cannot measure"):
            items = [_item(backend) for backend in batch]
        usages = await in_thread(_measure, gmemd.kernel, items)
        found.update(zip([backend.id for backend in batch], usages, strict=True))
    return found


def _item(backend: HostMemoryBackend) -> Item:
    """What is needed to measure an object; the fds are duplicates that `_measure` closes."""
    aside = os.dup(backend.private_fd) if backend.private_fd >= 0 else -1
    visibility = backend.visibility and backend.visibility.copy()
    return Item(_kind(backend), os.dup(backend.fd), backend.offset, backend.memory_size, visibility, aside)


def _measure(kernel: Kernel, items: list[Item]) -> list[Usage]:
    usages = []
    for item in items:
        usages.append(measure(kernel, item))
        close_fd(item.fd)
        if item.aside_fd >= 0:
            close_fd(item.aside_fd)
    return usages


def _host(kernel: Kernel) -> dict[str, Any]:
    return {"machine": machine(), "online": online_nodes(), "pools": kernel.huge_pools(),
            "headroom": kernel.headrooms()}


def _kind(backend: HostMemoryBackend) -> str:
    return "hugetlb-memfd" if backend.properties.get("hugetlb") else backend.kind


def _distinct(backends: list[HostMemoryBackend]) -> list[HostMemoryBackend]:
    """One object for each piece of memory: what was adopted twice, or a file of two objects, is paid for once."""
    found: dict[tuple[int, int, int], HostMemoryBackend] = {}
    for backend in backends:
        if backend.fd >= 0:
            status = os.fstat(backend.fd)
            found.setdefault((status.st_dev, status.st_ino, backend.offset), backend)
    return list(found.values())


def _sum(backends: list[HostMemoryBackend], usages: dict[str, Usage]) -> dict[str, int]:
    occupied = total(usages[backend.id] for backend in backends)
    return {"objects": len(backends), "size": sum([backend.memory_size for backend in backends]),
            **occupied.describe()}


def _grouped(backends: list[HostMemoryBackend], usages: dict[str, Usage], name: str, key: Any) -> list[dict[str, Any]]:
    """The sums of each group, the largest first; the member `name` is absent where the key is None."""
    groups: dict[Any, list[HostMemoryBackend]] = {}
    for backend in backends:
        groups.setdefault(key(backend), []).append(backend)
    rows = [({} if value is None else {name: value}) | _sum(members, usages) for value, members in groups.items()]
    return sorted(rows, key=lambda row: -row["resident"])


def _usage(entry: dict[str, Any]) -> Usage:
    return Usage(**{name: entry[name] for name in Usage._fields})


def _entry(backend: HostMemoryBackend, usage: Usage) -> dict[str, Any]:
    return {"id": backend.id, "uid": backend.owner[0], "kind": _kind(backend), "size": backend.memory_size,
            **usage.describe()}


def _pool(pool: HugePool) -> dict[str, Any]:
    node = {} if pool.node is None else {"node": pool.node}
    return {"page-size": pool.page_size, **node, "total": pool.total, "free": pool.free, "reserved": pool.reserved,
            "surplus": pool.surplus}


def _headroom(one: Headroom) -> dict[str, Any]:
    return {"available": one.available, "total": one.total, "limit": one.limit}
