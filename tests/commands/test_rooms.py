"""Rooms: what one tenant has exists for it, and for those who see all, and for nobody else."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from gmemd.changes.change import WithFds
from gmemd.commands.returning import adopt_restored
from gmemd.objects.names import at_home, outside
from gmemd.objects.records import record_of
from gmemd.persist.record import Record
from gmemd.persist.restore import Restored
from gmemd.schema.validate import Schema
from tests.commands.conftest import Machine
from tests.commands.live import LiveMachine

SIZE = 1 << 20
ALICE, BOB = 1000, 1001


@pytest_asyncio.fixture
async def host() -> AsyncIterator[LiveMachine]:
    """A host with an object `x` of each of two tenants, the second one larger, and one of nobody's room."""
    machine = LiveMachine()
    machine.become(None)
    await machine.do("object-add", qom_type="memory-backend-memfd", id="x", size=SIZE)
    for size, uid in enumerate((ALICE, BOB), 2):
        machine.become(uid)
        await machine.do("object-add", qom_type="memory-backend-memfd", id="x", size=size * SIZE)
    yield machine
    machine.become(None)
    await machine.close()


async def listed(machine: LiveMachine, command: str, **arguments: Any) -> list[Any]:
    found = await machine.do(command, **arguments)
    rows: list[Any] = json.loads(found) if isinstance(found, bytes) else found
    return rows


def test_names() -> None:
    """A name outside, and back; an id of QEMU's has no @."""
    for name in ("x", "a-b.c_d", "x[private]"):
        assert at_home(name) == (name, None)
    assert outside("x", str(ALICE)) == "x@1000"
    assert outside(["x", "y"], str(ALICE)) == ["x@1000", "y@1000"]
    assert at_home("x@1000") == ("x", str(ALICE))
    assert at_home("x@1000[private]") == ("x[private]", str(ALICE))
    for name in ("@1000", "x@", "x@-y", "x@y_", "x@1@1000"):
        assert at_home(name) == (name, None)


@pytest.mark.asyncio
async def test_a_tenant_finds_only_its_own(host: LiveMachine) -> None:
    """Under its own id, in every list, and by no other name."""
    for size, uid in enumerate((ALICE, BOB), 2):
        host.become(uid)
        assert [(row["id"], row["size"]) for row in await listed(host, "query-memdev")] == [("x", size * SIZE)]
        [row] = await listed(host, "query-memdev-status")
        assert (row["id"], row["owner"]["uid"]) == ("x", uid)
        bill = await host.do("query-memdev-accounting", objects=10)
        assert ([one["id"] for one in bill["list"]], bill["size"]) == (["x"], size * SIZE)
        assert [row["name"] for row in await listed(host, "qom-list", path="/objects")] == ["type", "x"]
        assert await host.do("qom-get", path="/objects/x", property="size") == size * SIZE
        for name in ("x@1000", "x@1001"):
            assert await host.refused("object-del", id=name) == f"object '{name}' not found"
            assert await host.refused("qom-get", path=f"/objects/{name}", property="size") == (
                f"Device '/objects/{name}' not found")


@pytest.mark.asyncio
async def test_who_sees_all_calls_it_by_its_tenant(host: LiveMachine) -> None:
    """In lists, on paths and in commands, which are carried out where it is."""
    host.become(None)
    every = {"x": SIZE, "x@1000": 2 * SIZE, "x@1001": 3 * SIZE}
    assert {row["id"]: row["size"] for row in await listed(host, "query-memdev")} == every
    assert {row["id"]: row["size"] for row in await listed(host, "query-memdev-status")} == every
    assert [row["id"] for row in await listed(host, "query-memdev-status", id="x@1000")] == ["x@1000"]
    bill = await host.do("query-memdev-accounting", objects=10)
    assert ({one["id"]: one["size"] for one in bill["list"]}, bill["size"]) == (every, 6 * SIZE)
    assert [one["id"] for one in (await host.do("query-memdev-accounting", objects=10, after="x@1000"))["list"]] == []
    assert {row["name"] for row in await listed(host, "qom-list", path="/objects")} == {"type", *every}
    assert await host.do("qom-get", path="/objects/x@1001", property="size") == 3 * SIZE
    assert await host.do("qom-set", path="/objects/x@1001", property="dump", value=False) == {}
    assert host.gmemd.rooms[str(BOB)].objects.find("x").get("dump") is False
    effect = await host.do("query-command-effect", command="object-del", arguments={"id": "x@1001"})
    assert effect["effect"].startswith("would delete 'x'")
    await host.do("object-del", id="x@1001")
    assert {row["id"] for row in await listed(host, "query-memdev")} == {"x", "x@1000"}
    host.become(BOB)
    assert await host.refused("object-del", id="x") == "object 'x' not found"


@pytest.mark.asyncio
async def test_an_error_says_whose_object_it_is_about(host: LiveMachine) -> None:
    """To those who see all by the name that they use; to the tenant by its own. Alone, in a transaction, and tried."""
    absent = [{"type": "object-del", "data": {"id": "y@1000"}}]
    host.become(None)
    assert await host.refused("object-del", id="y@1000") == "object 'y@1000' not found"
    assert await host.refused("memdev-clear-runner", id="x@1001") == "no guest runs on object 'x@1001'"
    assert await host.refused("memdev-transaction", actions=absent) == (
        "actions[0] (object-del): object 'y@1000' not found")
    assert await host.refused("query-command-effect", command="object-del", arguments={"id": "y@1000"}) == (
        "object 'y@1000' not found")
    assert await host.refused("object-del", id="y") == "object 'y' not found"
    host.become(ALICE)
    assert await host.refused("memdev-clear-runner", id="x") == "no guest runs on object 'x'"


@pytest.mark.asyncio
async def test_only_a_tenant_creates_in_its_room(host: LiveMachine) -> None:
    """What is created for others would be charged to them."""
    host.become(None)
    for add in ({"qom_type": "memory-backend-memfd", "size": SIZE}, {"qom_type": "thread-context"}):
        assert await host.refused("object-add", id="y@1000", **add) == "only user 1000 creates objects in its room"
    assert await host.refused("object-add", id="y@1002", qom_type="memory-backend-memfd", size=SIZE) == (
        "Parameter 'id' expects an identifier")
    host.become(ALICE)
    await host.do("object-add", id="y", qom_type="memory-backend-memfd", size=SIZE)


@pytest.mark.asyncio
async def test_events_go_to_the_room_and_to_those_who_see_all(host: LiveMachine) -> None:
    """To each with the names that it knows; SHUTDOWN to everybody."""
    host.become(ALICE)
    host.events.clear()
    await host.do("memdev-verify", id="x", job_id="j", chunk=SIZE)
    assert ("1000: JOB_STATUS_CHANGE", {"id": "j", "status": "created"}) in host.events
    assert ("JOB_STATUS_CHANGE", {"id": "j@1000", "status": "created"}) in host.events
    assert not any(name.startswith("1001: ") for name, _ in host.events)
    assert await listed(host, "query-jobs") != []
    host.become(BOB)
    assert await listed(host, "query-jobs") == []
    assert await host.refused("job-cancel", id="j") == "Job not found"
    host.become(None)
    assert [job["id"] for job in await listed(host, "query-jobs")] == ["j@1000"]
    await host.ended("j@1000")
    assert await host.do("job-dismiss", id="j@1000") == {}
    host.events.clear()
    host.gmemd.room_of(str(BOB)).shutdown("host-signal")
    assert sorted(name for name, _ in host.events) == ["1000: SHUTDOWN", "1001: SHUTDOWN", "SHUTDOWN"]


@pytest.mark.asyncio
async def test_a_descriptor_that_was_handed_out_is_of_its_owner(host: LiveMachine) -> None:
    """Each gets the memory of its own `x`."""
    files = set()
    for uid in (None, ALICE, BOB):
        host.become(uid)
        reply = await host.do("memdev-get-fd", id="x")
        assert isinstance(reply, WithFds)
        files.add(os.fstat(reply.fds[0]).st_ino)
        for fd in reply.fds:
            os.close(fd)
    assert len(files) == 3


def test_fd_sets_are_of_a_room(machine: Machine) -> None:
    """Each counts its own from 0."""
    for uid in (ALICE, BOB):
        machine.become(uid)
        machine.sent.append(os.memfd_create("m"))
        assert machine.run("add-fd")["fdset-id"] == 0
        assert len(machine.run("query-fdsets")) == 1


@pytest.mark.asyncio
async def test_snapshots_are_in_a_directory_of_the_room(tmp_path: Path) -> None:
    """Of which others see nothing, whatever its name."""
    host = LiveMachine(snapshots=str(tmp_path / "s"))
    host.become(ALICE)
    await host.do("object-add", qom_type="memory-backend-memfd", id="x", size=SIZE)
    await host.do("memdev-snapshot", id="x", name="first")
    assert [one["name"] for one in await listed(host, "query-memdev-snapshots")] == ["first"]
    assert (tmp_path / "s" / "@1000" / "first" / "manifest.json").exists()
    for uid in (BOB, None):
        host.become(uid)
        assert await listed(host, "query-memdev-snapshots") == []
        assert "not found" in await host.refused("memdev-restore", id="y", name="first")
    host.become(BOB)
    await host.do("object-add", qom_type="memory-backend-memfd", id="x", size=SIZE)
    await host.do("memdev-snapshot", id="x", name="first")
    await host.close()


def test_records_come_back_into_their_rooms(machine: Machine) -> None:
    """With what is lost and what was moved away; ids of the registry are of the whole host."""
    machine.become(ALICE)
    machine.run("object-add", qom_type="memory-backend-memfd", id="x", size=SIZE)
    backend = machine.room.objects.find("x")
    record = record_of(backend, machine.gmemd.kernel)
    assert (record.id, record.owner_uid) == ("x@1000", ALICE)
    restored = Restored()
    restored.objects = [(record, os.dup(backend.fd)), (Record("x", *_rest(record)), os.dup(backend.fd)),
                        (Record("gone@1001", "moved", {}, "memfd", SIZE, extra={"move": _moved()}), -1)]
    restored.lost = [Record("l@1001", *_rest(record)), Record("l", *_rest(record))]
    other = Machine(schema=Schema.load())
    adopt_restored(other.gmemd, restored)
    other.become(ALICE)
    assert (other.run("query-memdev-status")[0]["id"], other.run("query-memdev-lost")) == ("x", [])
    other.become(BOB)
    assert ([row["id"] for row in other.run("query-memdev-lost")], other.run("query-memdev")) == (["l"], b"[]")
    assert [row["id"] for row in other.run("query-memdev-moves")] == ["gone"]
    assert "was moved to" in other.refusal("object-add", qom_type="memory-backend-memfd", id="gone", size=SIZE)[1]
    other.become(None)
    assert {row["id"] for row in other.run("query-memdev-status")} == {"x", "x@1000"}
    assert {row["id"] for row in other.run("query-memdev-lost")} == {"l", "l@1001"}
    assert [row["id"] for row in other.run("query-memdev-moves", id="gone@1001")] == ["gone@1001"]
    assert other.gmemd.describe() == "2 objects of 2 MiB in total, kernel simulated, 2 lost"
    other.gmemd.close()


def _rest(record: Record) -> tuple[Any, ...]:
    return record.qom_type, record.arguments, record.kind, record.size, record.kernel, ALICE, 1, 0, record.extra


def _moved() -> dict[str, Any]:
    return {"token": "t", "state": "gone", "peer": "elsewhere", "generation": 1}
