"""Long answers hold nobody up, and are the same as short ones."""

from __future__ import annotations

import asyncio
import fcntl
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio

from gmemd.changes.pace import TURN, Pace
from gmemd.commands.listing import SHORT, in_turns, listed
from gmemd.commands.measure import LITTLE
from gmemd.errors import QmpError
from gmemd.kernel.uapi import F_ADD_SEALS, F_SEAL_WRITE
from gmemd.memory.ranges import PRIVATE
from gmemd.qmp.encode import encode
from gmemd.qmp.rows import Pieces
from tests.commands.live import LiveMachine

pytestmark = pytest.mark.asyncio

MANY = 4 * SHORT


@pytest_asyncio.fixture
async def live() -> AsyncIterator[LiveMachine]:
    """A machine with many objects."""
    machine = LiveMachine()
    for number in range(MANY):
        await machine.do("object-add", qom_type="memory-backend-ram", id=f"o{number}", size=4096)
    yield machine
    await machine.close()


@pytest.mark.parametrize("rows", [[], [1, {"a": []}, "x"], [{"b": 1, "a": 2}]])
async def test_the_bytes_do_not_depend_on_the_length(rows: list[Any]) -> None:
    """A list that is made in turns is the list that is made at once, alone and as a member."""
    around = {"zeta": 1, "list": ..., "huge-pages": [[], {}], "a": "x"}
    assert b"".join(await listed(iter(rows), SHORT + 1)) == encode(listed(iter(rows), SHORT))
    assert b"".join(await listed(iter(rows), SHORT + 1, **around)) == encode(listed(iter(rows), SHORT, **around))
    assert b"".join(await in_turns([encode(row) for row in rows], Pace())) == encode(rows)


async def test_others_have_their_turn() -> None:
    """The event loop goes on while the rows of a list are made."""
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    def rows() -> Iterator[int]:
        for number in range(20):
            began = asyncio.get_running_loop().time()
            while asyncio.get_running_loop().time() - began < TURN:
                pass
            yield number

    task = asyncio.create_task(other())
    assert b"".join(await listed(rows(), SHORT + 1)) == encode(list(range(20)))
    task.cancel()
    assert turns >= 19


async def answer(live: LiveMachine, command: str, **arguments: Any) -> tuple[bool, bytes]:
    """Whether a command's answer is made in turns, and its bytes."""
    made = live.dispatch(command, **arguments)
    in_turns = asyncio.iscoroutine(made)
    value = await made if in_turns else made
    value = b"".join(value) if isinstance(value, Pieces) else value
    return in_turns, value if isinstance(value, bytes) else encode(value)


async def test_many_objects(live: LiveMachine) -> None:
    """qom-list, qom-list-get and query-memdev of many, and the same one by one."""
    ids = [f"o{number}" for number in range(MANY)]
    listing = await live.do("qom-list", path="/objects")
    long, text = await answer(live, "qom-list-get", paths=ids)
    assert long
    assert text == encode([(await live.do("qom-list-get", paths=[one]))[0] for one in ids])
    long, text = await answer(live, "qom-list-get", paths=["/", "/objects"])
    assert long
    assert text.count(b'"value": "/objects/o') == MANY
    assert listing.count(b'"child<memory-backend-ram>"') == MANY
    long, text = await answer(live, "query-memdev")
    assert long
    assert text.count(b'"id"') == MANY


@pytest.mark.parametrize("survival", [True, False])
async def test_the_status_of_many(live: LiveMachine, survival: bool) -> None:
    """Whatever is special about one, and however it is measured: as the same one by one, members in the same order."""
    for name, kind, size, populated in (("m", "memfd", 4096, True), ("b", "memfd", 2 * LITTLE, True),
                                        ("f", "memfd", 4096, False), ("g", "guest-memfd", 8192, True)):
        await live.do("object-add", qom_type=f"memory-backend-{kind}", id=name, size=size, prealloc=populated)
    fcntl.fcntl(live.gmemd.objects.find("f").fd, F_ADD_SEALS, F_SEAL_WRITE)
    long, text = await answer(live, "query-memdev-status", survival=survival)
    assert long
    rows = {row["id"]: row for row in json.loads(text)}
    for backend in live.gmemd.objects:
        [one] = json.loads(encode(await live.do("query-memdev-status", id=backend.id, survival=survival)))
        row = rows.pop(backend.id)
        assert one["age"] - row["age"] in (0, 1)
        assert list({**row, "age": 0}.items()) == list({**one, "age": 0}.items())
        assert ("survival" in row) == survival
        assert row["resident"] == (row["size"] if backend.properties["prealloc"] else 0)
    assert rows == {}


async def test_an_object_that_is_not_there(live: LiveMachine) -> None:
    """One path among many is wrong: that is the answer."""
    paths = [f"o{number}" for number in range(MANY)]
    with pytest.raises(QmpError, match="Device 'none' not found"):
        await live.do("qom-list-get", paths=[*paths, "none"])
    await live.do("object-del", id="o7")
    with pytest.raises(QmpError, match="Device 'o7' not found"):
        await live.do("qom-list-get", paths=paths)


async def test_many_of_everything_else(live: LiveMachine) -> None:
    """Jobs, digests and ranges."""
    for number in range(MANY):
        job = live.gmemd.jobs.create(f"j{number}", "verify", 1)
        job.result = [{"offset": at, "size": 1, "digest": "x"} for at in range(MANY)]
        job.conclude(None)
    await live.do("object-add", qom_type="memory-backend-guest-memfd", id="g", size=1 << 30)
    visibility = live.gmemd.objects.find("g").visibility
    assert visibility is not None
    for number in range(MANY):
        visibility.set(number * 8192, 4096, PRIVATE)
    for command, arguments, count in (("query-jobs", {}, MANY), ("query-memdev-ranges", {"id": "g"}, 2 * MANY),
                                      ("query-memdev-digests", {"job_id": "j1"}, MANY),
                                      ("query-memdev-digests", {"job_id": "j1", "offset": 9, "limit": 200}, 200)):
        long, text = await answer(live, command, **arguments)
        assert long
        assert text.count(b"{") in (count, count + 1)
    digests = await live.do("query-memdev-digests", job_id="j1", offset=9, limit=2)
    assert [digest["offset"] for digest in digests] == [9, 10]
    assert await live.do("query-memdev-digests", job_id="j1", offset=MANY) == []
