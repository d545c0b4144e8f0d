"""Measuring: one object's trouble is its own, parts are measured as parts, and a shortage fails no command."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import json
import os
import resource
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_asyncio

from gmemd.backends.memfd import MemfdBackend
from gmemd.commands import measure
from gmemd.commands.measure import Measurer, item_of
from gmemd.errors import QmpError
from gmemd.kernel.kernel import Kernel
from gmemd.memory.cells import measure_cells
from gmemd.memory.usage import Usage
from gmemd.web import api
from gmemd.web.picture import Painter
from gmemd.web.state import State
from tests.commands.live import LiveMachine
from tests.patience import wait_for

PAGE = os.sysconf("SC_PAGESIZE")
SIZE = 8 * PAGE
BIG = 2 * measure.AT_ONCE


class Meddling:
    """A kernel that does something, or fails, when a certain file is measured."""

    def __init__(self, kernel: Kernel, fd: int, then: Callable[[], None]) -> None:
        self._kernel = kernel
        self._inode = os.fstat(fd).st_ino
        self._then = then

    def resident(self, fd: int, offset: int = 0, size: int = 0) -> int:
        if os.fstat(fd).st_ino == self._inode:
            self._then()
        return self._kernel.resident(fd, offset, size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)


@pytest_asyncio.fixture
async def live() -> AsyncIterator[LiveMachine]:
    """A machine that has given every fd back in the end."""
    before = set(os.listdir("/proc/self/fd"))
    made = LiveMachine()
    yield made
    await made.close()
    wait_for(lambda: set(os.listdir("/proc/self/fd")) == before)  # what takes long to close is closed in a thread


def meddle(live: LiveMachine, name: str, then: Callable[[], None]) -> None:
    kernel = live.gmemd.kernel
    live.gmemd.kernel = cast(Kernel, Meddling(kernel, live.gmemd.objects.find(name).fd, then))


def failing(code: int) -> Callable[[], None]:
    def fail() -> None:
        raise OSError(code, os.strerror(code))
    return fail


async def add(live: LiveMachine, *names: str, size: int = SIZE, qom_type: str = "memory-backend-memfd",
              **more: Any) -> None:
    for name in names:
        await live.do("object-add", qom_type=qom_type, id=name, size=size, **more)


async def status(live: LiveMachine, **which: str) -> dict[str, dict[str, Any]]:
    """What query-memdev-status says, by id."""
    found = await live.do("query-memdev-status", **which)
    return {row["id"]: row for row in (json.loads(found) if isinstance(found, bytes) else found)}


async def swept(live: LiveMachine) -> tuple[Measurer, Usage]:
    measurer = Measurer(live.gmemd)
    sweep = await measurer.sweep(60)
    assert sweep is not None
    return measurer, sweep.usage


async def file_of(live: LiveMachine, path: Path, parts: dict[str, tuple[int, int]], **more: Any) -> None:
    """Objects that are parts (first page, pages) of a file of zeros, all of it in the page cache."""
    path.write_bytes(b"x" * 16 * PAGE)
    for name, (first, pages) in parts.items():
        await add(live, name, qom_type="memory-backend-file", size=pages * PAGE, offset=first * PAGE,
                  mem_path=str(path), share=True, **more)


# -- one object's trouble is its own


@pytest.mark.parametrize("code", [errno.EPERM, errno.EACCES, errno.EIO, errno.EBADF, errno.EOPNOTSUPP, errno.ESTALE])
@pytest.mark.parametrize("number", [2, 60])
async def test_one_that_cannot_be_measured_is_unknown(live: LiveMachine, code: int, number: int) -> None:
    """Its residency is absent, all others are known: on the event loop and in threads, in accounting and web."""
    await add(live, *(f"m{index}" for index in range(number)), prealloc=True)
    meddle(live, "m1", failing(code))
    found = await status(live)
    assert {name for name, row in found.items() if "resident" not in row} == {"m1"}
    assert {row["resident"] for row in found.values() if "resident" in row} == {SIZE}
    bill = await live.do("query-memdev-accounting", objects=100)
    assert (bill["objects"], bill["unknown"], bill["resident"]) == (number, 1, (number - 1) * SIZE)
    measurer, totals = await swept(live)
    assert (totals.unknown, totals.shared) == (1, (number - 1) * SIZE)
    assert [backend.id for backend in live.gmemd.objects if measurer.last(backend) is None] == ["m1"]


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be somebody else than the file's owner")
async def test_another_users_image(live: LiveMachine, tmp_path: Path) -> None:
    """The kernel does not count a file for whom it neither belongs to nor may write it (Linux 6.13)."""
    (tmp_path / "image").write_bytes(b"x" * SIZE)
    (tmp_path / "image").chmod(0o644)
    await add(live, "image", qom_type="memory-backend-file", mem_path=str(tmp_path / "image"), readonly=True,
              share=True)
    await add(live, "own", prealloc=True)
    os.seteuid(65534)
    try:
        found = await status(live)
    finally:
        os.seteuid(0)
    assert found["own"]["resident"] == SIZE
    assert found["image"].get("resident", SIZE) == SIZE


async def test_http_leaves_out_what_is_not_known(live: LiveMachine) -> None:
    """The members are absent there as in the command, and the page says that it is unknown."""
    await add(live, "m0", "m1", prealloc=True)
    meddle(live, "m1", failing(errno.EPERM))
    state = State(live.dispatcher, lambda: 0)
    try:
        found = (await api.objects(state, {"q": "", "sort": "id", "offset": 0, "limit": 9}))["objects"]
        assert [{name for name in row if name.startswith("resident")} for row in found] == [
            {"resident", "resident-private", "resident-shared"}, set()]
        picture = await Painter(state).paint({"q": "", "sort": "id", "page": 1}, 60)
        assert ["unknown" in picture.rows[name] for name in ("m0", "m1")] == [False, True]
        assert "1 object not measured" in picture.sections["summary"]
    finally:
        state.close()


async def test_a_judgement_does_not_need_it(live: LiveMachine) -> None:
    """What deleting or discarding would do is said all the same."""
    await add(live, "m1", prealloc=True)
    meddle(live, "m1", failing(errno.EPERM))
    for command, more in (("object-del", {}), ("memdev-discard", {"offset": 0, "size": PAGE})):
        judged = await live.do("query-command-effect", command=command, arguments={"id": "m1", **more})
        assert "an unknown number of" in judged["effect"]


# -- parts


async def test_a_part_is_measured_as_a_part(live: LiveMachine, tmp_path: Path) -> None:
    """Each object shows its own pages, whatever else of its file is in memory."""
    await file_of(live, tmp_path / "f", {"a": (0, 4), "b": (4, 2), "c": (6, 10)})
    assert {name: row["resident"] // PAGE for name, row in (await status(live)).items()} == {"a": 4, "b": 2, "c": 10}
    measurer, totals = await swept(live)
    assert totals.shared == 16 * PAGE
    last = measurer.last(live.gmemd.objects.find("b"))
    assert last is not None
    assert last.shared == 2 * PAGE


@pytest.mark.parametrize(("parts", "pages", "objects"), [
    ({"a": (0, 8), "b": (4, 8)}, 12, 2),  # they overlap
    ({"a": (4, 4), "b": (0, 16)}, 16, 2),  # the second begins before and ends behind
    ({"a": (0, 16), "b": (4, 4)}, 16, 1),  # the second is in the first
    ({"a": (0, 4), "b": (8, 4), "c": (2, 8)}, 12, 3),  # the third fills the gap
    ({"a": (0, 4), "b": (4, 4)}, 8, 2),  # they touch
    ({"a": (0, 8), "b": (0, 8), "c": (0, 8)}, 8, 1),  # the same three times
])
async def test_what_several_have_counts_once(live: LiveMachine, tmp_path: Path, parts: dict[str, tuple[int, int]],
                                             pages: int, objects: int) -> None:
    """In the sums each page is counted once; each object still shows all that it has."""
    await file_of(live, tmp_path / "f", parts)
    bill = await live.do("query-memdev-accounting", objects=9)
    assert (bill["objects"], bill["size"], bill["resident"]) == (objects, pages * PAGE, pages * PAGE)
    for group in ("owners", "kinds", "nodes"):
        assert sum(row["resident"] for row in bill[group]) == pages * PAGE
    assert {row["id"]: row["resident"] // PAGE for row in bill["list"]} == {
        name: size for name, (_, size) in parts.items()}
    assert (await swept(live))[1].shared == pages * PAGE


async def test_memory_that_was_adopted_twice(live: LiveMachine) -> None:
    """A memfd that two objects are counts once, in every sum."""
    await add(live, "m", prealloc=True)
    handed = await live.do("memdev-get-fd", id="m")
    for name in ("again", "and-again"):
        live.sent.append(os.dup(handed.fds[0]))
        await live.do("getfd", fdname="f")
        await live.do("memdev-adopt", id=name, fdname="f")
    os.close(handed.fds.pop())
    assert {row["resident"] for row in (await status(live)).values()} == {SIZE}
    bill = await live.do("query-memdev-accounting", objects=9)
    assert (bill["objects"], bill["resident"], len(bill["list"])) == (1, SIZE, 3)
    assert (await swept(live))[1].shared == SIZE


async def test_the_older_one_is_billed(live: LiveMachine, tmp_path: Path) -> None:
    """Of what two objects have, the sums of the groups count it for the older."""
    await file_of(live, tmp_path / "f", {"a": (0, 8), "b": (4, 8)})
    live.gmemd.objects.find("a").owner = (1, 1)
    live.gmemd.objects.find("b").owner = (2, 2)
    bill = await live.do("query-memdev-accounting")
    assert {row["uid"]: row["resident"] // PAGE for row in bill["owners"]} == {1: 8, 2: 4}


async def test_preserved_bytes_are_part_of_the_status(live: LiveMachine) -> None:
    """What is kept aside occupies memory for the object, in the command as on the web."""
    await add(live, "g", qom_type="memory-backend-guest-memfd", prealloc=True)
    await live.do("memdev-convert", id="g", offset=0, size=2 * PAGE, to="private", preserve=True)
    assert (await status(live))["g"]["resident"] == SIZE
    assert (await swept(live))[1].by_visibility["private"] == 2 * PAGE


async def test_a_strip_shows_the_part(live: LiveMachine, tmp_path: Path) -> None:
    """The picture of an object's pages begins where the object begins."""
    await file_of(live, tmp_path / "f", {"a": (12, 4)})
    os.truncate(tmp_path / "f", 0)
    os.truncate(tmp_path / "f", 16 * PAGE)
    with (tmp_path / "f").open("r+b") as file:
        for page in (0, 13):
            os.pwrite(file.fileno(), b"x", page * PAGE)
    absent, present = (0, 0, 0, PAGE), (0, PAGE, 0, 0)
    assert measure_cells(live.gmemd.kernel, item_of(live.gmemd.objects.find("a"))) == [absent, present, absent, absent]


# -- deleted meanwhile


@pytest.mark.parametrize("number", [2, 60])
async def test_what_is_deleted_meanwhile_is_left_out(live: LiveMachine, number: int) -> None:
    """The same answer from the list of all, the accounting and a sweep."""
    async def gone_during(ask: Callable[[], Any]) -> Any:
        await add(live, "gone", qom_type="memory-backend-guest-memfd", size=BIG)  # in a thread even if it is empty
        loop = asyncio.get_running_loop()
        kernel = live.gmemd.kernel

        def delete() -> None:
            if live.gmemd.objects.get("gone") is not None:
                loop.call_soon_threadsafe(lambda: live.gmemd.spawn(live.do("object-del", id="gone")))
                while live.gmemd.objects.get("gone") is not None:
                    time.sleep(0.001)

        meddle(live, "gone", delete)
        try:
            return await ask()
        finally:
            live.gmemd.kernel = kernel

    await add(live, *(f"m{index}" for index in range(number)))
    assert "gone" not in await gone_during(lambda: status(live))
    bill = await gone_during(lambda: live.do("query-memdev-accounting", objects=100))
    assert (bill["objects"], len(bill["list"])) == (number, number)
    assert (await gone_during(lambda: swept(live)))[1].unknown == 0
    with pytest.raises(QmpError, match="object 'gone' not found"):
        await gone_during(lambda: status(live, id="gone"))


async def test_what_is_deleted_is_forgotten(live: LiveMachine) -> None:
    """What was measured of an object does not keep it, and another one of its id is unknown."""
    await add(live, "m")
    measurer = Measurer(live.gmemd)
    await measurer.measure([live.gmemd.objects.find("m")], 0)
    await live.do("object-del", id="m")
    gc.collect()
    objects = live.gmemd.objects
    assert [one for one in gc.get_objects() if type(one) is MemfdBackend and one.home is objects] == []
    await add(live, "m")
    assert measurer.last(live.gmemd.objects.find("m")) is None


# -- a shortage


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """No more than that many descriptors can be opened."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + count, limits[1]))
    taken = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        for _ in range(count):
            os.close(taken.pop())
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("left", [0, 1, 3])
async def test_without_descriptors_for_duplicates(live: LiveMachine, left: int) -> None:
    """Fewer are measured at a time; without any, small ones are measured, large ones unknown: no command fails."""
    await add(live, *(f"m{index}" for index in range(60)), prealloc=True)
    await add(live, "big", qom_type="memory-backend-guest-memfd", size=BIG)
    await add(live, "g", qom_type="memory-backend-guest-memfd", prealloc=True)
    await live.do("memdev-convert", id="g", offset=0, size=PAGE, to="private", preserve=True)
    with descriptors_left(left):
        found = await status(live)
        one = await status(live, id="m1")
        measurer, totals = await swept(live)
        before = sorted(os.dup(0) for _ in range(left))  # as many as before: nothing has stayed open
        for fd in before:
            os.close(fd)
    assert len(found) == 62
    assert {name for name, row in found.items() if row.get("resident") != SIZE} == {"big"}
    assert found["big"].get("resident") == (0 if left else None)
    assert one["m1"]["resident"] == SIZE
    assert (totals.occupied, totals.unknown) == (61 * SIZE, 0 if left else 1)
    assert measurer.last(live.gmemd.objects.find("m1")) is not None


async def test_a_second_duplicate_that_fails_closes_the_first(live: LiveMachine) -> None:
    """An object with two files and one descriptor left: it is measured without, and the one is free again."""
    await add(live, "g", qom_type="memory-backend-guest-memfd", prealloc=True)
    await live.do("memdev-convert", id="g", offset=0, size=PAGE, to="private", preserve=True)
    with descriptors_left(1):
        for _ in range(3):
            assert (await swept(live))[1].by_visibility["private"] == PAGE


async def test_without_threads(live: LiveMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none can be started, small objects are measured on the event loop, and no descriptor stays open."""
    def refuse(*_: object) -> Any:
        raise QmpError("cannot start a thread: Resource temporarily unavailable")

    await add(live, *(f"m{index}" for index in range(60)), prealloc=True)
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(measure, "in_thread", refuse)
    assert {row["resident"] for row in (await status(live)).values()} == {SIZE}
    assert len(os.listdir("/proc/self/fd")) == before
