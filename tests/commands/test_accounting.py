"""The bill: sums that are exact, sums that are compared, and nothing allocated by looking."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from gmemd.commands.accounting import comparisons, machine, placement
from gmemd.kernel.affinity import online_nodes
from gmemd.kernel.hugepages import HugePool
from gmemd.memory.usage import Usage
from gmemd.qmp.encode import encode
from tests.commands.live import LiveMachine

PAGE = os.sysconf("SC_PAGESIZE")
SIZE = 8 * PAGE


@pytest_asyncio.fixture(params=["simulated", pytest.param("kvm", marks=pytest.mark.kvm)])
async def live(request: pytest.FixtureRequest) -> AsyncIterator[LiveMachine]:
    """A machine with a guest_memfd of two private and three shared pages, and a memfd with one page."""
    machine = LiveMachine(request.param)
    await machine.do("object-add", qom_type="memory-backend-guest-memfd", id="g", size=SIZE)
    await machine.do("object-add", qom_type="memory-backend-memfd", id="m", size=SIZE)
    kernel = machine.gmemd.kernel
    kernel.allocate(machine.gmemd.objects.find("m").fd, PAGE, PAGE)
    await machine.do("memdev-convert", id="g", offset=0, size=4 * PAGE, to="private")
    kernel.allocate(machine.gmemd.objects.find("g").fd, 2 * PAGE, 5 * PAGE)
    yield machine
    await machine.close()


async def test_sums(live: LiveMachine) -> None:
    """Private and shared make up resident; owners, kinds and nodes each make up the whole."""
    bill = await live.do("query-memdev-accounting", objects=10)
    assert (bill["objects"], bill["size"], bill["resident"]) == (2, 2 * SIZE, 6 * PAGE)
    assert (bill["private"], bill["shared"], bill["aside"], bill["unknown"]) == (2 * PAGE, 4 * PAGE, 0, 0)
    for group in ("owners", "kinds", "nodes", "list"):
        for member in ("size", "resident", "private", "shared", "aside"):
            assert sum(row[member] for row in bill[group]) == bill[member], (group, member)
    assert [row["kind"] for row in bill["kinds"]] == ["guest-memfd", "memfd"]
    assert [row["uid"] for row in bill["owners"]] == [os.getuid()]
    assert sorted((row["id"], row["private"], row["shared"]) for row in bill["list"]) \
        == [("g", 2 * PAGE, 3 * PAGE), ("m", 0, PAGE)]


async def test_nothing_is_allocated_by_looking(live: LiveMachine) -> None:
    """The same twice, and no fd is left."""
    before = len(os.listdir("/proc/self/fd"))
    first = await live.do("query-memdev-accounting")
    second = await live.do("query-memdev-accounting")
    assert (first["resident"], first["list"]) == (second["resident"], [])
    assert len(os.listdir("/proc/self/fd")) == before


async def test_preserved_bytes_are_on_the_bill(live: LiveMachine) -> None:
    """What is set aside is counted in addition to what is resident."""
    await live.do("memdev-convert", id="g", offset=0, size=SIZE, to="private", preserve=True)
    bill = await live.do("query-memdev-accounting")
    assert (bill["private"], bill["aside"]) == (2 * PAGE, 3 * PAGE)


async def test_discarded_pages_leave_the_bill(live: LiveMachine) -> None:
    """memdev-discard gives back exactly what it says."""
    await live.do("memdev-discard", id="g", offset=0, size=SIZE)
    assert (await live.do("query-memdev-accounting"))["resident"] == PAGE


async def test_the_list_is_paged(live: LiveMachine) -> None:
    """`after` begins behind an object, in the order of query-memdev."""
    for number in range(5):
        await live.do("object-add", qom_type="memory-backend-memfd", id=f"x{number}", size=PAGE)
    order = [backend.id for backend in live.gmemd.objects]
    listed: list[str] = []
    while page := (await live.do("query-memdev-accounting", objects=3,
                                 **({"after": listed[-1]} if listed else {})))["list"]:
        listed += [row["id"] for row in page]
    assert listed == order
    assert await live.refused("query-memdev-accounting", after="nobody") == "object 'nobody' not found"


async def test_a_long_list_is_the_same_in_portions(live: LiveMachine) -> None:
    """It is encoded bit by bit, with the result that few objects have at once."""
    for number in range(250):
        await live.do("object-add", qom_type="memory-backend-memfd", id=f"x{number}", size=PAGE)
    few = await live.do("query-memdev-accounting", objects=100)
    many = json.loads(await live.do("query-memdev-accounting", objects=1000))
    assert list(json.loads(encode(few))) == list(many)
    assert many["list"][:100] == few["list"]
    assert [row["id"] for row in many["list"]] == [backend.id for backend in live.gmemd.objects]
    rest = json.loads(await live.do("query-memdev-accounting", objects=1000, after=few["list"][-1]["id"]))
    assert rest["list"] == many["list"][100:]


async def test_shared_memory_is_paid_for_once(live: LiveMachine, tmp_path: Path) -> None:
    """Two objects of one file: each shows what it has, the sums count it once."""
    path = tmp_path / "f"
    path.write_bytes(b"x" * SIZE)
    for name in ("a", "b"):
        await live.do("object-add", qom_type="memory-backend-file", id=name, size=SIZE, mem_path=str(path),
                      share=True)
    bill = await live.do("query-memdev-accounting", objects=9)
    assert (bill["objects"], len(bill["list"])) == (3, 4)
    assert next(row for row in bill["kinds"] if row["kind"] == "file")["resident"] == SIZE


async def test_what_the_kernel_says(live: LiveMachine) -> None:
    """Its sums are never less than ours; the machine's head-room and its pools are there."""
    bill = await live.do("query-memdev-accounting")
    assert [row["drift"] for row in bill["compared"]] == [0] * len(bill["compared"])
    assert bill["compared"][0]["what"] == "Shmem"
    assert bill["headroom"][0]["limit"] == "the machine"
    assert all(pool["free"] <= pool["total"] for pool in bill["huge-pages"])


async def test_the_loop_goes_on_meanwhile() -> None:
    """Many objects are measured off the event loop, in batches."""
    live = LiveMachine()
    for number in range(300):
        await live.do("object-add", qom_type="memory-backend-memfd", id=f"m{number}", size=PAGE)
    turns, done = 0, asyncio.create_task(live.do("query-memdev-accounting"))
    while not done.done():
        await asyncio.sleep(0)
        turns += 1
    assert done.result()["objects"] == 300
    assert turns > 5
    await live.close()


async def test_an_object_that_goes_meanwhile(live: LiveMachine) -> None:
    """It is accounted or not, and nothing else happens."""
    asked = asyncio.create_task(live.do("query-memdev-accounting", objects=9))
    await asyncio.sleep(0)
    await live.do("object-del", id="m")
    assert "g" in [row["id"] for row in (await asked)["list"]]


def test_drift_is_reported() -> None:
    """Where the kernel has less than the objects claim, by how much."""
    pool = HugePool(2 << 20, None, total=4, free=3, surplus=0, reserved=0, overcommit=0)
    usages: dict[str, Any] = {"memfd": Usage(100), "guest-memfd": Usage(50, aside=5),
                              "hugetlb-memfd": Usage(4 << 20)}
    assert comparisons(usages, "Shmem", {"Shmem": 155}, [pool]) == [
        {"what": "Shmem", "objects": 155, "kernel": 155, "drift": 0},
        {"what": "huge pages in use", "objects": 4 << 20, "kernel": 2 << 20, "drift": 2 << 20}]
    assert comparisons(usages, "Unevictable", {"Shmem": 104, "Unevictable": 60}, [])[:2] == [
        {"what": "Shmem", "objects": 105, "kernel": 104, "drift": 1},
        {"what": "Unevictable", "objects": 50, "kernel": 60, "drift": 0}]


def test_figures_of_the_machine(tmp_path: Path) -> None:
    """In bytes, by name; nodes by ranges."""
    (tmp_path / "meminfo").write_text("MemTotal:  2 kB\nHugePages_Total:  0\nShmem: 1 kB\n")
    assert machine(str(tmp_path)) == {"MemTotal": 2048, "Shmem": 1024}
    assert online_nodes(str(tmp_path)) == [0]
    (tmp_path / "devices/system/node").mkdir(parents=True)
    (tmp_path / "devices/system/node/online").write_text("0-1,4\n")
    assert online_nodes(str(tmp_path)) == [0, 1, 4]


def test_placement() -> None:
    """Known with one node, or bound to one."""
    assert placement("default", [], [0]) == 0
    assert placement("bind", [1], [0, 1]) == 1
    assert placement("preferred", [1], [0, 1]) is None


async def test_the_status_of_many_objects() -> None:
    """It is measured in turns, in the order of query-memdev, and leaves no fds."""
    live = LiveMachine()
    for number in range(250):
        await live.do("object-add", qom_type="memory-backend-memfd", id=f"m{number}", size=PAGE)
    before = len(os.listdir("/proc/self/fd"))
    turns, asked = 0, asyncio.create_task(live.do("query-memdev-status"))
    while not asked.done():
        await asyncio.sleep(0)
        turns += 1
    assert [row["id"] for row in json.loads(asked.result())] == [backend.id for backend in live.gmemd.objects]
    assert turns > 2
    assert len(os.listdir("/proc/self/fd")) == before
    await live.close()
