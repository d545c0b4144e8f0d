"""What a dry run of a transaction is tried on, and what it would do to the machine's memory."""

from __future__ import annotations

from collections import Counter
from copy import copy
from typing import Any

from gmemd.authority.ledger import Budget, Trials
from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.threads import in_thread
from gmemd.commands.accounting import placement
from gmemd.commands.context import Gmemd
from gmemd.errors import os_errors
from gmemd.kernel.affinity import online_nodes
from gmemd.kernel.hugepages import default_size
from gmemd.kernel.kernel import Kernel
from gmemd.objects.trial import Trial

_Sizes = Counter[tuple[int, int | None]]  # bytes by page size and node


def trial_of(gmemd: Gmemd, trials: Trials) -> Gmemd:
    """The daemon's parts with a copy of the objects and accounts, which a dry run changes instead."""
    other = copy(gmemd)
    other.objects = Trial(gmemd.objects)
    other.tree = gmemd.tree.over(other.objects)
    other.lost, other.gone = dict(gmemd.lost), dict(gmemd.gone)
    other.rooms = {tenant: trial_of(room, trials) for tenant, room in gmemd.rooms.items()}
    for room in other.rooms.values():
        room.house = other
    other.account = None if gmemd.account is None else trials.of(gmemd.account)
    other.tree.rooms |= {tenant: room.objects for tenant, room in other.rooms.items()}
    return other


async def planned(gmemd: Gmemd, trial: Gmemd) -> dict[str, Any]:
    """The members of MemdevTransaction about memory."""
    with os_errors("cannot read the machine's memory"):
        members: dict[str, Any] = await in_thread(_add_up, gmemd.kernel, gmemd.by_age(), trial.by_age())
    return members


def quota_planned(before: Budget | None, after: Budget | None) -> dict[str, Any]:
    """The member of MemdevTransaction about the client's account, if it is limited."""
    if before is None or after is None:
        return {}
    used = before.account.describe()
    return {"quota": [{"what": what, "used": amount, **({"limit": after.limits[what]} if what in after.limits else {})}
                      for what, amount in after.account.describe().items() if amount != used.get(what, 0)]}


def _add_up(kernel: Kernel, before: list[HostMemoryBackend], after: list[HostMemoryBackend]) -> dict[str, Any]:
    sizes = _sizes(after, kernel.page_size)
    sizes.subtract(_sizes(before, kernel.page_size))
    pages, nodes = Counter[int](), Counter[int | None]()
    for (page, node), size in sizes.items():
        pages[page] += size
        nodes[node] += size
    return {"bytes": sum(sizes.values()),
            "pages": [{"page-size": page, "bytes": size, "free": _free(kernel, page)}
                      for page, size in sorted(pages.items()) if size],
            "nodes": [({} if node is None else {"node": node}) | {"bytes": size}
                      for node, size in sorted(nodes.items(), key=lambda one: (one[0] is None, one[0])) if size]}


def _sizes(backends: list[HostMemoryBackend], page_size: int) -> _Sizes:
    """The bytes of objects; a clone has none of its own."""
    found, online = _Sizes(), online_nodes()
    for backend in backends:
        if not backend.template:
            properties = backend.properties
            page = properties["hugetlbsize"] or default_size() if properties.get("hugetlb") else page_size
            found[page, placement(properties["policy"], properties["host-nodes"], online)] += \
                backend.memory_size or backend.size
    return found


def _free(kernel: Kernel, page: int) -> int:
    if page == kernel.page_size:
        return min([headroom.available for headroom in kernel.headrooms()])
    return sum([pool.free * pool.page_size for pool in kernel.huge_pools() if pool.page_size == page
                and pool.node is None])
