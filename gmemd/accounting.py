"""The bill: what each object, each owner and all together occupy, and how that compares with the kernel's figures.

Exact is what the kernel counts for each file: resident pages (cachestat) and blocks (st_blocks). The machine's
own sums hold the memory of others, too: of them only "not less than ours" can be asked.
No asyncio here and nothing is touched or allocated; measuring takes long, so that it is for a worker thread.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from gmemd.kernel.base import HugePool, Kernel
from gmemd.ranges import PRIVATE, RangeMap

PROC = "/proc"
SYS = "/sys"


class Item(NamedTuple):
    """What of an object must be known to measure it; the fds are borrowed."""

    kind: str  # "guest-memfd", "memfd", "hugetlb-memfd" or "file"
    fd: int
    offset: int  # bytes
    size: int  # bytes
    visibility: RangeMap | None
    aside_fd: int  # of preserved private bytes; -1: there are none


class Usage(NamedTuple):
    """Bytes that occupy memory."""

    resident: int = 0
    private: int = 0  # of resident: in private ranges
    shared: int = 0  # of resident: in shared ranges, and all that is no guest_memfd
    aside: int = 0  # beside it: preserved private bytes
    swapped: int = 0  # that the file has, but not in memory
    unknown: int = 0  # objects that the kernel does not tell of

    def describe(self) -> dict[str, int]:
        """Its members in an account."""
        return self._asdict()


def total(usages: Iterable[Usage]) -> Usage:
    """The sum of usages."""
    return Usage(*map(sum, zip(Usage(), *usages, strict=True)))


def measure(kernel: Kernel, item: Item) -> Usage:
    """Measure one object."""
    try:
        resident = kernel.resident(item.fd, item.offset, item.size)
        private = _private(kernel, item, resident)
        aside = kernel.resident(item.aside_fd) if item.aside_fd >= 0 else 0
        return Usage(resident, private, resident - private, aside, _swapped(item, resident))
    except OSError:
        return Usage(unknown=1)


def _private(kernel: Kernel, item: Item, resident: int) -> int:
    """The resident bytes in private ranges; where most is private, what is not is counted."""
    visibility = item.visibility
    if visibility is None or not resident:
        return 0
    if len(visibility) == 1:
        return resident if visibility.at(0) is PRIVATE else 0
    return min(resident, sum(kernel.resident(item.fd, item.offset + offset, size)
                             for offset, size, state in visibility.ranges() if state is PRIVATE))


def _swapped(item: Item, resident: int) -> int:
    """What a memfd's blocks are more than its resident pages: pages in swap. Others' blocks say something else."""
    status = os.fstat(item.fd)
    blocks = status.st_blocks * 512
    if item.kind not in ("memfd", "guest-memfd") or blocks == 0:  # a real guest_memfd has no blocks
        return 0
    return max(0, blocks - resident)


def machine(proc: str = PROC) -> dict[str, int]:
    """The machine's figures, in bytes, by their names in meminfo."""
    with open(f"{proc}/meminfo") as lines:
        return {row[0].rstrip(":"): int(row[1]) << 10 for row in map(str.split, lines) if row[-1] == "kB"}


def comparisons(by_kind: Mapping[str, Usage], guest_counter: str, figures: Mapping[str, int],
                pools: Iterable[HugePool]) -> list[dict[str, Any]]:
    """Ours beside the kernel's sums: each must not be less than ours; `drift` is by how much it is.

    guest_counter: the one of the machine's figures in which guest_memfds are counted.
    """
    memory, guest = by_kind.get("memfd", Usage()), by_kind.get("guest-memfd", Usage())
    ours = {"Shmem": memory.resident + memory.aside + guest.aside}
    ours[guest_counter] = ours.get(guest_counter, 0) + guest.resident
    found = [_row(name, amount, figures.get(name, 0)) for name, amount in ours.items()]
    used = sum((pool.total - pool.free) * pool.page_size for pool in pools if pool.node is None)
    found.append(_row("huge pages in use", by_kind.get("hugetlb-memfd", Usage()).resident, used))
    return found


def _row(what: str, ours: int, kernel: int) -> dict[str, Any]:
    return {"what": what, "objects": ours, "kernel": kernel, "drift": max(0, ours - kernel)}


def online_nodes(sys: str = SYS) -> list[int]:
    """The NUMA nodes that are online; [0] on a kernel that knows none."""
    try:
        with open(f"{sys}/devices/system/node/online") as file:
            text = file.read().strip()
    except OSError:
        return [0]
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def placement(policy: str, nodes: list[int], online: list[int]) -> int | None:
    """The node that an object's pages are surely on; None when that is not known without mapping them."""
    if len(online) == 1:
        return online[0]
    return nodes[0] if policy == "bind" and len(nodes) == 1 else None
