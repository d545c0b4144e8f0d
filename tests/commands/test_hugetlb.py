"""Objects of real 2 MiB pages, where the machine lets the test reserve some; and what happens with none."""

from __future__ import annotations

import mmap
import os
from collections.abc import AsyncIterator, Callable

import pytest_asyncio
from xxhash import xxh3_128_hexdigest

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
    """The pages leave the pool, are on the bill as huge pages, and come back."""
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
