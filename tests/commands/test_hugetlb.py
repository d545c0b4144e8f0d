"""Objects of real 2 MiB pages, where the machine lets the test reserve some; and what happens with none."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from xxhash import xxh3_128_hexdigest

from gmemd.errors import QmpError
from tests.commands.live import LiveMachine
from tests.kernel.conftest import huge_pages as huge_pages

HUGE = 2 << 20
MEMORY = {"qom_type": "memory-backend-memfd", "id": "h", "hugetlb": True, "hugetlbsize": HUGE, "size": 3 * HUGE}

Reserve = Callable[[int], None]


@pytest_asyncio.fixture
async def live() -> AsyncIterator[LiveMachine]:
    machine = LiveMachine()
    yield machine
    await machine.close()


async def add(machine: LiveMachine, **more: object) -> int:
    await machine.do("object-add", **{**MEMORY, **more})
    return machine.gmemd.objects.find("h").fd


async def test_preallocated(live: LiveMachine, huge_pages: Reserve) -> None:
    """The pages leave the pool, are accounted as huge pages, and come back."""
    huge_pages(4)
    await add(live, prealloc=True)
    bill = await live.do("query-memdev-accounting", objects=1)
    assert [(row["kind"], row["resident"]) for row in bill["kinds"]] == [("hugetlb-memfd", 3 * HUGE)]
    pool = next(pool for pool in bill["huge-pages"] if pool["page-size"] == HUGE and "node" not in pool)
    assert pool["total"] - pool["free"] >= 3
    assert [row["drift"] for row in bill["compared"]] == [0, 0]
    await live.do("object-del", id="h")
    bill = await live.do("query-memdev-accounting")
    assert next(one for one in bill["huge-pages"] if one["page-size"] == HUGE)["free"] == pool["free"] + 3


async def test_partly_filled(live: LiveMachine, huge_pages: Reserve) -> None:
    """One page of three: verify reads it and allocates no other; wiping leaves zeros and frees it."""
    huge_pages(3)
    fd = await add(live)
    with mmap.mmap(fd, 3 * HUGE) as memory:
        memory[HUGE] = 9
        await live.do("memdev-verify", id="h", job_id="v")
        assert "error" not in await live.ended("v")
        page = memory[HUGE:2 * HUGE]
        assert await live.do("query-memdev-digests", job_id="v") \
            == [{"offset": HUGE, "size": HUGE, "digest": xxh3_128_hexdigest(page)}]
        bill = await live.do("query-memdev-accounting")
        assert (bill["resident"], bill["unknown"]) == (HUGE, 0)
        held = os.dup(fd)
        await live.do("memdev-delete", id="h", zero=True)
        assert os.fstat(held).st_blocks == 0
        os.close(held)


async def test_discard_gives_the_page_back(live: LiveMachine, huge_pages: Reserve) -> None:
    """Whole huge pages go back to the pool."""
    huge_pages(3)
    await add(live, prealloc=True)
    await live.do("memdev-discard", id="h", offset=HUGE, size=HUGE)
    assert (await live.do("query-memdev-accounting"))["resident"] == 2 * HUGE


async def test_none_reserved(live: LiveMachine, huge_pages: Reserve) -> None:
    """Refused when it is made, by the kernel's ENOMEM, before anybody could meet SIGBUS; then with pages it works."""
    huge_pages(0)
    assert await live.refused("object-add", **MEMORY) \
        == "unable to map backing store for guest RAM: Cannot allocate memory"
    huge_pages(3)
    await add(live)


async def test_a_pool_too_small(live: LiveMachine, huge_pages: Reserve) -> None:
    """Preallocation of more than there is leaves the pool as it was."""
    huge_pages(2)
    assert "Cannot allocate memory" in await live.refused("object-add", **MEMORY, prealloc=True)
    await add(live, size=2 * HUGE, prealloc=True)


@pytest.fixture
def hugetlbfs() -> Iterator[Path]:
    """A file system of 2 MiB pages, mounted nowhere: it goes with its descriptor."""
    libc = ctypes.CDLL(None, use_errno=True)
    fsopen, fsconfig, fsmount = 430, 431, 432  # include/uapi/asm-generic/unistd.h
    context = libc.syscall(fsopen, b"hugetlbfs", 1)
    if context < 0:
        pytest.skip(f"needs to mount hugetlbfs: {os.strerror(ctypes.get_errno())}")
    assert libc.syscall(fsconfig, context, 1, b"pagesize", b"2M", 0) == 0  # FSCONFIG_SET_STRING
    assert libc.syscall(fsconfig, context, 6, None, None, 0) == 0  # FSCONFIG_CMD_CREATE
    root = libc.syscall(fsmount, context, 1, 0)
    os.close(context)
    yield Path(f"/proc/self/fd/{root}")
    os.close(root)


@pytest.mark.parametrize(("properties", "desc"), [
    ({"size": 1}, "memory size 0x1000 must be equal to or larger than page size 0x200000"),
    ({"size": 1 << 20}, "memory size 0x100000 must be equal to or larger than page size 0x200000"),
    ({"size": 1 << 20, "align": 4096}, "alignment 0x1000 must be multiples of page size 0x200000"),
    ({"size": 1 << 20, "align": 3 * HUGE}, "alignment 0x600000 must be a power of two"),
    ({"size": 1 << 20, "offset": 4096}, "offset 0x1000 must be multiples of page size 0x200000"),
    ({"size": HUGE + 1, "reserve": False}, "backend 'memory-backend-file' memory size must be multiple of 2 MiB"),
    ({"size": -8192}, "unable to map backing store for guest RAM: Invalid argument"),
    ({"size": HUGE, "align": 1 << 47, "reserve": False},
     "unable to map backing store for guest RAM: Cannot allocate memory"),
    ({"size": HUGE + 4096, "offset": HUGE, "reserve": False, "mem_path": "there"},
     "h backing store size 0x400000 is too small for 'size' option 0x201000 plus 'offset' option 0x200000"),
])
async def test_files_of_huge_pages(live: LiveMachine, hugetlbfs: Path, properties: dict[str, object],
                                   desc: str) -> None:
    """A file on hugetlbfs is judged by its pages, in QEMU's words and order."""
    (hugetlbfs / "there").touch()
    os.truncate(hugetlbfs / "there", 2 * HUGE)
    path = hugetlbfs / str(properties.get("mem_path", "new"))
    with pytest.raises(QmpError) as caught:
        await live.do("object-add", **{"qom_type": "memory-backend-file", "id": "h", **properties,
                                       "mem_path": str(path)})
    assert caught.value.desc == desc
