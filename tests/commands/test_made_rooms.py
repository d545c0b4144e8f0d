"""Made rooms: who makes them, what is created in them and charged to them, and what their clients may."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from gmemd.authority.gate import of_a_member
from gmemd.authority.ledger import Account, Budget
from gmemd.authority.rights import Rights, Role
from gmemd.changes.change import WithFds
from gmemd.commands.returning import adopt_restored
from gmemd.errors import COMMAND_NOT_FOUND
from gmemd.objects.records import record_of
from gmemd.objects.rooms import MadeRoom
from gmemd.persist.restore import Restored
from tests.commands.conftest import Machine
from tests.commands.live import LiveMachine

MIB = 1 << 20
MALFORMED = "cannot be a room's id: up to 63 letters, digits and '-', not only digits, are one"


def memfd(object_id: str, size: int = MIB) -> dict[str, Any]:
    return {"qom_type": "memory-backend-memfd", "id": object_id, "size": size}


def enter(machine: Machine, room: str) -> None:
    """Be a client of a made room from now on."""
    machine.become(None)
    machine.rights = of_a_member(room, machine.gmemd.schema)
    machine.room = machine.gmemd.rooms[room]
    account = machine.room.account
    assert account is not None
    machine.budget = Budget(account, account.limits)
    machine.usable = machine.dispatcher.usable(machine.rights)


def leave(machine: Machine) -> None:
    """Be one who sees everybody's objects again."""
    machine.become(None)
    machine.budget = None


async def listed(machine: LiveMachine, command: str, **arguments: Any) -> Any:
    found = await machine.do(command, **arguments)
    return json.loads(found) if isinstance(found, bytes) else found


@pytest_asyncio.fixture
async def host(tmp_path: Path) -> AsyncIterator[LiveMachine]:
    """A host with an object `x` in the house and in each of the rooms a-1 and b, and a directory for snapshots."""
    machine = LiveMachine(snapshots=str(tmp_path / "snapshots"))
    machine.become(None)
    for size, room in enumerate(("", "a-1", "b"), 1):
        if room:
            await machine.do("memdev-room-add", id=room)
        await machine.do("object-add", **memfd(f"x@{room}" if room else "x", size * MIB))
    yield machine
    leave(machine)
    await machine.close()


# -- making them -------------------------------------------------------------------------------------

@pytest.mark.parametrize(("arguments", "said"), [
    ({"id": "a-1"}, "room 'a-1' exists already"),
    ({"id": "12345"}, f"'12345' {MALFORMED}"),
    ({"id": "a.b"}, f"'a.b' {MALFORMED}"),
    ({"id": "-a"}, f"'-a' {MALFORMED}"),
    ({"id": "c" * 64}, f"'{'c' * 64}' {MALFORMED}"),
    ({"id": "c", "socket": "here"}, "parameter 'socket' must be a path that begins with '/'"),
    ({"id": "c", "socket": "/no/such/place/s"}, "Failed to bind socket to /no/such/place/s: No such file or directory"),
    ({"id": "c", "note": "n" * 65537}, "parameter 'note' must not be longer than 65536 bytes"),
    ({"id": "c", "limits": {"bites": 1}}, "Parameter 'limits.bites' is unexpected"),
])
async def test_a_room_that_cannot_be_made(host: LiveMachine, arguments: dict[str, Any], said: str) -> None:
    """It is refused, in a sentence, and nothing is left of it."""
    before = await listed(host, "query-memdev-rooms")
    assert await host.refused("memdev-room-add", **arguments) == said
    assert await listed(host, "query-memdev-rooms") == before
    assert not host.gmemd.rooms_coming
    if arguments["id"] == "c":
        await host.do("memdev-room-add", id="c")


async def test_who_makes_rooms(host: LiveMachine) -> None:
    """A tenant makes none, even if a policy lets it use the command: they would be rooms in its own."""
    host.become(1000)
    assert await host.refused("memdev-room-add", id="c") == "only who sees everybody's objects makes rooms"
    assert await host.refused("memdev-room-del", id="b") == "room 'b' not found"
    assert await listed(host, "query-memdev-rooms") == []


async def test_what_is_listed(host: LiveMachine, tmp_path: Path) -> None:
    """What a room was made with, and what is in it."""
    path = str(tmp_path / "s")
    limits = {"bytes": 8 * MIB, "objects": 3}
    await host.do("memdev-room-add", id="c", socket=path, namespace="team", note='{"a": 1}', limits=limits)
    assert await listed(host, "query-memdev-rooms", id="c") == [
        {"id": "c", "socket": path, "namespace": "team", "note": '{"a": 1}', "limits": limits, "objects": 0, "bytes": 0,
         "clients": 0}]
    assert [(row["id"], row["objects"], row["bytes"]) for row in await listed(host, "query-memdev-rooms")] == [
        ("a-1", 1, 2 * MIB), ("b", 1, 3 * MIB), ("c", 0, 0)]
    assert os.stat(path).st_mode & 0o777 == 0o666
    assert await host.refused("query-memdev-rooms", id="d") == "room 'd' not found"
    await host.do("memdev-room-del", id="c")
    assert not os.path.exists(path)


async def test_a_room_in_use_stays(host: LiveMachine) -> None:
    """As long as it has objects, what is left of some, contexts, or a job that runs."""
    assert await host.refused("memdev-room-del", id="b") == (
        "room 'b' has the object 'x': delete what is in it first")
    await host.do("object-add", **memfd("y@b"))
    assert await host.refused("memdev-room-del", id="b") == (
        "room 'b' has the object 'x' and 1 more: delete what is in it first")
    await host.do("memdev-verify", id="x@b", job_id="j", chunk=MIB)
    for name in ("x@b", "y@b"):
        await host.do("object-del", id=name)
    if host.gmemd.rooms["b"].jobs.find("j").status != "concluded":
        assert await host.refused("memdev-room-del", id="b") == "room 'b' has the job 'j', which runs"
    await host.ended("j@b")
    await host.do("memdev-room-del", id="b")
    assert host.events[-1] == ("JOB_STATUS_CHANGE", {"id": "j@b", "status": "null"})
    assert [row["id"] for row in await listed(host, "query-memdev-rooms")] == ["a-1"]
    assert await host.refused("object-add", **memfd("x@b")) == "Parameter 'id' expects an identifier"


async def test_in_a_transaction(host: LiveMachine, tmp_path: Path) -> None:
    """A room with its objects, all or nothing; a removed one is back, and its socket has been there all the time."""
    path = tmp_path / "s"
    make = {"type": "memdev-room-add", "data": {"id": "c", "socket": str(path)}}
    add = {"type": "object-add", "data": {"qom-type": "memory-backend-memfd", "id": "x@c", "size": MIB}}
    bad = {"type": "object-del", "data": {"id": "y@c"}}
    assert await host.refused("memdev-transaction", actions=[make, add, bad]) == (
        "actions[2] (object-del): object 'y@c' not found")
    assert not path.exists()
    assert "c" not in host.gmemd.rooms
    await host.do("memdev-transaction", actions=[make, add])
    inode = path.stat().st_ino
    remove = [{"type": "object-del", "data": {"id": "x@c"}}, {"type": "memdev-room-del", "data": {"id": "c"}}]
    assert await host.refused("memdev-transaction", actions=[*remove, bad]) == (
        "actions[2] (object-del): object 'y@c' not found")
    assert path.stat().st_ino == inode
    assert [row["id"] for row in await listed(host, "query-memdev-status")] == ["x", "x@a-1", "x@b", "x@c"]
    await host.do("memdev-transaction", actions=remove)
    assert not path.exists()


# -- being in one ------------------------------------------------------------------------------------

async def test_a_member_finds_only_what_is_in_the_room(host: LiveMachine) -> None:
    """And uses it, but makes and removes nothing."""
    enter(host, "a-1")
    assert [(row["id"], row["size"]) for row in await listed(host, "query-memdev-status")] == [("x", 2 * MIB)]
    assert [row["name"] for row in await listed(host, "qom-list", path="/objects")] == ["type", "x"]
    for name in ("x@b", "x@a-1", "/x"):
        assert await host.refused("memdev-get-fd", id=name) == f"object '{name}' not found"
    reply = await host.do("memdev-get-fd", id="x")
    assert isinstance(reply, WithFds)
    assert os.fstat(reply.fds[0]).st_size == 2 * MIB
    for fd in reply.fds:
        os.close(fd)
    await host.do("memdev-discard", id="x", offset=0, size=4096)
    rights = await host.do("query-memdev-rights")
    assert (rights["role"], rights["policy"], rights["paths"]) == ("member", True, [])
    for command, arguments in (
            ("object-add", memfd("y")), ("object-del", {"id": "x"}), ("memdev-room-del", {"id": "b"}),
            ("query-memdev-rooms", {}), ("memdev-clone", {"template": "x", "id": "y"})):
        assert await host.refused(command, **arguments) == f"Command {command} disabled by policy"
    assert await host.refused("memdev-get-fd", id="x", lease="delete") == "Command object-del disabled by policy"
    reply = await host.do("memdev-get-fd", id="x", lease="keep")
    for fd in reply.fds:
        os.close(fd)


async def test_a_member_has_no_snapshots_of_gmemds(host: LiveMachine) -> None:
    """Those in the house save what is in a room, and restore it into another; a member passes a directory."""
    await host.do("memdev-snapshot", id="x@a-1", name="first")
    await host.do("memdev-restore", id="y@b", name="first")
    assert {row["id"] for row in await listed(host, "query-memdev-status")} == {"x", "x@a-1", "x@b", "y@b"}
    enter(host, "a-1")
    assert await host.refused("memdev-snapshot", id="x", name="second") == (
        "this gmemd has no directory for snapshots: pass one by 'fdname'")


async def test_a_tenants_room_has_its_name(host: LiveMachine) -> None:
    """No made room can be taken for it, and what a tenant has is still created by the tenant only."""
    host.become(1000)
    await host.do("object-add", **memfd("x"))
    leave(host)
    assert {row["id"] for row in await listed(host, "query-memdev-status")} == {"x", "x@a-1", "x@b", "x@1000"}
    assert await host.refused("object-add", **memfd("y@1000")) == "only user 1000 creates objects in its room"
    assert await host.refused("memdev-room-del", id="1000") == "room '1000' not found"


# -- what it costs -----------------------------------------------------------------------------------

async def test_what_is_charged(host: LiveMachine) -> None:
    """To the room, whoever creates it, and above that to what it belongs to; dry runs say so."""
    await host.do("memdev-room-add", id="c", limits={"bytes": 3 * MIB, "objects": 2})
    await host.do("memdev-room-add", id="d")
    above = Account("namespace:team", {"bytes": 4 * MIB})
    rooms = [host.gmemd.rooms[name].account for name in ("c", "d")]
    for account in rooms:
        assert account is not None
        account.belong(above)
    await host.do("object-add", **memfd("x@c", 2 * MIB))
    assert await host.refused("object-add", **memfd("y@c", 2 * MIB)) == (
        f"the quota of 'bytes' is {3 * MIB}: {2 * MIB} are used, and {2 * MIB} more were asked for")
    assert await host.refused("object-add", **memfd("y@d", 3 * MIB)) == (
        f"the quota of 'bytes' is {4 * MIB}: {2 * MIB} are used, and {3 * MIB} more were asked for")
    adds = [{"type": "object-add", "data": {"qom-type": "memory-backend-memfd", "id": name, "size": MIB}}
            for name in ("y@c", "y@d", "z@d")]
    planned = await host.do("memdev-transaction", actions=adds, dry_run=True)
    assert [row.get("refused", {}).get("desc") for row in planned["actions"]] == [
        None, None, f"actions[2] (object-add): the quota of 'bytes' is {4 * MIB}: {4 * MIB} are used, and {MIB} more "
                    "were asked for"]
    used = [(account.used("bytes"), account.used("objects")) for account in [*rooms, above] if account is not None]
    assert used == [(2 * MIB, 1), (0, 0), (2 * MIB, 1)]
    quota = {row["account"]: {item["what"]: item["used"] for item in row["items"]}
             for row in await host.do("query-memdev-quota")}
    assert quota["room:c"]["bytes"] == 2 * MIB
    await host.do("object-del", id="x@c")
    await host.do("memdev-room-del", id="c")
    assert (above.used("bytes"), above.used("objects"), above.objects) == (0, 0, {})


async def test_a_members_jobs_are_charged_to_its_room(host: LiveMachine) -> None:
    """And given back with it."""
    await host.do("memdev-room-add", id="c", limits={"jobs": 1})
    await host.do("object-add", **memfd("x@c"))
    above = Account("namespace:team")
    account = host.gmemd.rooms["c"].account
    assert account is not None
    account.belong(above)
    enter(host, "c")
    await host.do("memdev-verify", id="x", job_id="j", chunk=MIB)
    assert await host.refused("memdev-verify", id="x", job_id="k", chunk=MIB) == (
        "the quota of 'jobs' is 1: 1 are used, and 1 more were asked for")
    await host.ended("j")
    leave(host)
    await host.do("object-del", id="x@c")
    await host.do("memdev-room-del", id="c")
    assert above.describe()["jobs"] == 0


# -- clones of what is in the house --------------------------------------------------------------------

async def test_a_template_of_the_house(host: LiveMachine) -> None:
    """It is cloned into rooms, where its clones have its pages; it stays as long as they do."""
    await host.do("memdev-freeze", id="x", origin="golden")
    for name in ("c@a-1", "c@b"):
        await host.do("memdev-clone", template="x", id=name)
    files = {os.fstat(one.fd).st_ino for one in host.gmemd.seen() if one.frozen}
    assert len(files) == 1
    [group] = await host.do("query-memdev-clones")
    assert (group["id"], group["clones"]) == ("x", ["c@a-1", "c@b"])
    status = {row["id"]: row.get("template") for row in await listed(host, "query-memdev-status")}
    assert (status["c@b"], status["x@b"]) == ("x", None)
    assert await host.refused("object-del", id="x") == (
        "object 'x' is the template of 'c@a-1', 'c@b': delete them first, or use 'force'")
    assert await host.refused("memdev-clone", template="y", id="d@b") == "object 'y' not found"
    assert await host.refused("memdev-clone", template="x@a-1", id="d@a-1") == (
        "object 'x@a-1' is not frozen: memdev-freeze makes it a template, or use 'copy'")
    await host.do("memdev-clone", template="x", id="copied@b", copy=True)
    enter(host, "b")
    assert {row["id"]: row["size"] for row in await listed(host, "query-memdev-status")} == {
        "x": 3 * MIB, "c": MIB, "copied": MIB}
    leave(host)
    for name in ("c@a-1", "c@b"):
        await host.do("object-del", id=name)
    await host.do("object-del", id="x")


# -- coming back ---------------------------------------------------------------------------------------

def test_a_room_comes_back(machine: Machine) -> None:
    """With what it was made with, and before its objects; an object without its room is there all the same."""
    machine.become(None)
    machine.run("memdev-room-add", id="a-1", namespace="team", note="n", limits={"bytes": 2 * MIB})
    machine.run("object-add", **memfd("x@a-1"))
    made, backend = machine.gmemd.rooms["a-1"].made, machine.gmemd.rooms["a-1"].objects.find("x")
    assert made is not None
    made.root = "/run"
    restored = Restored()
    record = record_of(backend, machine.gmemd.kernel)
    restored.objects = [(record, os.dup(backend.fd)), (record.changed(id="y@b"), os.dup(backend.fd)),
                        (made.recorded((7, 8)), -1)]
    other = Machine()
    adopt_restored(other.gmemd, restored)
    other.become(None)
    assert {row["id"] for row in other.run("query-memdev-status")} == {"x@a-1", "y@b"}
    [row] = other.run("query-memdev-rooms")
    assert row == {"id": "a-1", "namespace": "team", "note": "n", "limits": {"bytes": 2 * MIB}, "objects": 1,
                   "bytes": MIB, "clients": 0}
    back = other.gmemd.rooms["a-1"].made
    assert back is not None
    assert (back.root, back.record) == ("/run", made.recorded((7, 8)))
    other.run("memdev-room-add", id="b")
    assert other.run("query-memdev-rooms", id="b")[0]["objects"] == 1
    other.gmemd.close()


def test_what_is_recorded() -> None:
    """A record is the room again, and its id no object's."""
    made = MadeRoom("a", socket="/s", note="n")
    record = made.recorded((1, 2))
    assert (record.id, record.qom_type, record.fd_name, record.owner_uid) == ("@a", "room", "", 1)
    assert MadeRoom.of(record).said() == made.said() == {"socket": "/s", "note": "n"}


def test_a_policy_gives_a_member_more(machine: Machine) -> None:
    """`allow` adds commands; what a member then creates is charged to its room."""
    machine.become(None)
    machine.run("memdev-room-add", id="a-1", limits={"objects": 1})
    enter(machine, "a-1")
    assert machine.refusal("object-add", **memfd("y"))[0] == COMMAND_NOT_FOUND
    machine.rights = Rights(Role.MEMBER, commands=frozenset(machine.gmemd.schema.commands), paths=(), room="a-1")
    machine.usable = machine.dispatcher.usable(machine.rights)
    machine.run("object-add", **memfd("y"))
    assert machine.refusal("object-add", **memfd("z"))[1].startswith("the quota of 'objects' is 1")
    leave(machine)
    assert [row["id"] for row in machine.run("query-memdev-status")] == ["y@a-1"]
