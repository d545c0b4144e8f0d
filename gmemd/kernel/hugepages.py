"""The pools of huge pages, read from sysfs (Documentation/admin-guide/mm/hugetlbpage.rst)."""

from __future__ import annotations

import os
from typing import NamedTuple

SYS = "/sys"


class HugePool(NamedTuple):
    """One pool of huge pages of one size, on one node or (node None) of the machine. Counts are in pages."""

    page_size: int  # bytes
    node: int | None
    total: int
    free: int
    surplus: int
    reserved: int  # of the free ones, reserved for mappings; counted only for the machine: 0 for a node
    overcommit: int  # how many surplus pages the kernel may allocate in total; 0 for a node


def default_size(meminfo: str = "/proc/meminfo") -> int:
    """The size in bytes of the huge pages that one gets without naming a size; 0 without huge pages."""
    with open(meminfo) as file:
        sizes = [int(line.split()[1]) << 10 for line in file if line.startswith("Hugepagesize:")]
    return sizes[0] if sizes else 0


def huge_pools(sys: str = SYS) -> list[HugePool]:
    """Every pool, by page size, the machine's before its nodes'; [] without huge pages."""
    pools = [_pool(directory, None) for directory in _list(f"{sys}/kernel/mm/hugepages", "hugepages-")]
    for node in _list(f"{sys}/devices/system/node", "node"):
        number = int(os.path.basename(node).removeprefix("node"))
        pools += [_pool(directory, number) for directory in _list(f"{node}/hugepages", "hugepages-")]
    return sorted(pools, key=lambda pool: (pool.page_size, -1 if pool.node is None else pool.node))


def _list(directory: str, prefix: str) -> list[str]:
    """The entries of a directory with this prefix; [] if it does not exist."""
    try:
        return [f"{directory}/{name}" for name in os.listdir(directory) if name.startswith(prefix)]
    except FileNotFoundError:
        return []


def _pool(directory: str, node: int | None) -> HugePool:
    def count(name: str) -> int:
        with open(f"{directory}/{name}") as file:
            return int(file.read())

    kib = int(os.path.basename(directory).removeprefix("hugepages-").removesuffix("kB"))
    return HugePool(page_size=kib << 10, node=node, total=count("nr_hugepages"), free=count("free_hugepages"),
                    surplus=count("surplus_hugepages"), reserved=count("resv_hugepages") if node is None else 0,
                    overcommit=count("nr_overcommit_hugepages") if node is None else 0)
