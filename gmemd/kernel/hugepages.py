"""The pools of huge pages, read from sysfs (Documentation/admin-guide/mm/hugetlbpage.rst)."""

from __future__ import annotations

from pathlib import Path

from .base import HugePool

SYS = Path("/sys")
PROC = Path("/proc")


def huge_pools(sys: Path = SYS) -> list[HugePool]:
    """Return every pool, by page size, the machine's before its nodes'; [] without huge pages."""
    pools = [_pool(directory, None) for directory in sys.glob("kernel/mm/hugepages/hugepages-*kB")]
    for directory in sys.glob("devices/system/node/node*/hugepages/hugepages-*kB"):
        pools.append(_pool(directory, int(directory.parts[-3].removeprefix("node"))))
    return sorted(pools, key=lambda pool: (pool.page_size, -1 if pool.node is None else pool.node))


def default_size(proc: Path = PROC) -> int:
    """Return the bytes of a huge page where no size is asked for; 2 MiB where the kernel has none at all."""
    for line in (proc / "meminfo").read_text().splitlines():
        if line.startswith("Hugepagesize:"):
            return int(line.split()[1]) << 10
    return 2 << 20


def _pool(directory: Path, node: int | None) -> HugePool:
    def count(name: str) -> int:
        return int((directory / name).read_text())

    kib = int(directory.name.removeprefix("hugepages-").removesuffix("kB"))
    return HugePool(
        page_size=kib << 10,
        node=node,
        total=count("nr_hugepages"),
        free=count("free_hugepages"),
        surplus=count("surplus_hugepages"),
        reserved=count("resv_hugepages") if node is None else 0,
        overcommit=count("nr_overcommit_hugepages") if node is None else 0,
    )
