"""What others have is to a tenant, and to a member of a made room, what does not exist: the same bytes in answer to
every command of the schema.

Each command is sent by a tenant of its own, who has nothing, and names `x` wherever it can name something: on a host on
which others have an `x` of every kind, and on one on which there is nothing.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gmemd.authority.gate import of_a_member
from gmemd.changes.change import WithFds
from gmemd.changes.completed import completed
from gmemd.commands.returning import adopt_restored
from gmemd.errors import QmpError
from gmemd.objects.fds import NamedFds
from gmemd.persist.record import Record
from gmemd.persist.restore import Restored
from gmemd.qmp.session import Request
from gmemd.schema.validate import Schema
from tests.arguments import of_every_command
from tests.commands.live import LiveMachine

SIZE = 1 << 20
SCHEMA = Schema.load()
OWNERS = range(1000, 1010)  # each has an `x` of another kind
FIRST = 2000  # uid of the tenant who sends the first command
MEMFD = {"qom_type": "memory-backend-memfd", "id": "x", "size": SIZE}

Case = tuple[str, dict[str, Any]]


# -- every command -------------------------------------------------------------------------------------

def value(schema: dict[str, Any], name: str) -> Any:
    """A value of a member: `x` if that can be a name."""
    if "$ref" in schema:
        return value(SCHEMA.document["$defs"][schema["$ref"].rpartition("/")[2]], name)
    if "enum" in schema:
        return schema["enum"][-1]
    match schema.get("type"):
        case "string":
            return {"path": "/objects/x", "property": "size", "command": "object-del"}.get(name, "x")
        case "array":
            return [value(schema["items"], name.removesuffix("s"))]
        case "integer":
            return SIZE if name == "size" else 0
        case "boolean":
            return True
        case "object":
            return {member: value(inner, member) for member, inner in schema["properties"].items()
                    if member in schema.get("required", ())}
    return {"id": "x"} if name == "arguments" else 1


def cases(*, long: bool) -> Iterator[Case]:
    """Each command with what it requires, and with all that it takes; `long`: with each optional member alone, too."""
    for name, required, members in of_every_command(SCHEMA, lambda member, inner: value(inner, member)):
        optional = [member for member in members if member not in required]
        alone = [(member,) for member in optional] if long else []
        for more in dict.fromkeys([(), *alone, tuple(optional)]):
            yield name, required | {member: members[member] for member in more}


# -- the two hosts -------------------------------------------------------------------------------------

class Host(LiveMachine):
    """A host whose tenants send one command each."""

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        os.chdir(folder)
        super().__init__(snapshots=str(folder / "snapshots"))

    async def enter(self, number: int, *, made: bool) -> str:
        """Be the tenant with this uid, or the client of a made room of its own; the name of the room."""
        if not made:
            self.become(number)
            return str(number)
        self.become(None)
        room = f"r-{number}"
        if room not in self.gmemd.rooms:
            await self.do("memdev-room-add", id=room, namespace="team")
        self.rights, self.room = of_a_member(room, SCHEMA), self.gmemd.rooms[room]
        self.usable = self.dispatcher.usable(self.rights)
        return room

    async def answer(self, number: int, case: Case, *, made: bool) -> tuple[bytes, int, list[Any]]:
        """The bytes of the reply, how many descriptors came with it, and the events until then."""
        room = await self.enter(number, made=made)
        self.named_fds = NamedFds()
        self.named_fds.receive("x", memfd())
        self.sent = [memfd()]
        self.events.clear()
        request, fds = Request(case[0], case[1], None), 0
        try:
            result = await asyncio.wait_for(completed(self.dispatcher.run(request, self.session, self)), 30)
            if type(result) is WithFds:
                fds, result = len(result.fds), await closed(result)
            if case[0] == "query-memdev-accounting":
                result = {member: of_the_host(member, known) for member, known in result.items()}
            reply = self.session.success(request, result)
        except QmpError as exc:
            reply = self.session.failure(request, exc)
        for fd in (*self.sent, *self.named_fds.take_all()):
            os.close(fd)
        mine = [event for event in self.events if event[0].startswith(f"{room}: ")]
        while self.tasks:  # of a job, before the next command
            await asyncio.wait(list(self.tasks))
        return reply, fds, mine

    async def fill(self) -> None:
        """Give others an `x` of every kind."""
        house, *owners = (None, *OWNERS)
        self.become(house)
        await self.do("object-add", **MEMFD)
        for uid in owners[:4]:
            self.become(uid)
            await self.do("object-add", **MEMFD)
        self.become(owners[1])
        await closed(await self.do("memdev-get-fd", id="x", lease="keep"))
        self.become(owners[2])
        await self.do("memdev-freeze", id="x", origin="x")
        await self.do("memdev-clone", template="x", id="y")
        await self.do("memdev-snapshot", id="x", name="x")
        self.become(owners[3])
        await self.do("memdev-set-runner", id="x", pid=os.getpid())
        await self.do("memdev-verify", id="x", job_id="x", chunk=SIZE)
        self.become(owners[4])
        await self.do("object-add", qom_type="memory-backend-guest-memfd", id="x", size=SIZE)
        await self.do("memdev-convert", id="x", offset=0, size=4096, to="private")
        self.become(owners[5])
        await self.do("object-add", qom_type="thread-context", id="x")
        self.sent = [memfd()]
        await self.do("add-fd", fdset_id=0, opaque="x")
        restored = Restored()
        move = {"token": "x", "state": "gone", "peer": "x", "generation": 1}
        restored.objects = [(Record(f"x@{owners[6]}", "moved", {}, "memfd", SIZE, extra={"move": move}), -1)]
        restored.lost = [Record(f"x@{owners[7]}", "memory-backend-memfd", {}, "memfd", SIZE)]
        restored.unclaimed = [("x", memfd())]
        adopt_restored(self.gmemd, restored)
        self.become(None)
        await self.do("memdev-room-add", id="x", namespace="team", note="x", limits={"objects": 2})
        await self.do("object-add", **{**MEMFD, "id": "x@x"})
        await self.do("memdev-snapshot", id="x@x", name="x")
        while self.tasks:
            await asyncio.wait(list(self.tasks))


def of_the_host(member: str, known: Any) -> Any:
    """What is not the kernel's: that says of the whole host what everybody can read in /proc and /sys."""
    if member == "compared":
        return [row["objects"] for row in known]
    return [] if member in ("headroom", "huge-pages") else known


async def closed(reply: WithFds) -> Any:
    """The value of a reply whose descriptors are closed."""
    for fd in reply.fds:
        os.close(fd)
    return reply.value


def memfd() -> int:
    fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    return fd


async def answers(folder: Path, *, filled: bool, long: bool = False, own: bool = False,
                  made: bool = False) -> list[tuple[Case, Any]]:
    """What the tenants are answered, in their order; `own`: each has a memfd `x`; `made`: they are members instead."""
    host = Host(folder)
    try:
        if filled:
            await host.fill()
        found = []
        for uid, case in enumerate(cases(long=long), FIRST):
            if own:
                host.become(uid)
                await host.do("object-add", **MEMFD)
            found.append((case, await host.answer(uid, case, made=made)))
        return found
    finally:
        host.become(None)
        await host.close()


@pytest.mark.parametrize("made", [False, True], ids=["tenant", "member"])
@pytest.mark.asyncio
async def test_what_others_have_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, made: bool) -> None:
    """Every command is answered on a full host as on an empty one."""
    monkeypatch.chdir(tmp_path)
    empty = await answers(tmp_path / "host", filled=False, made=made)
    full = await answers(tmp_path / "host", filled=True, made=made)
    for (case, expected), (_, actual) in zip(empty, full, strict=True):
        assert actual == expected, case
    assert {case[0] for case, _ in full} == SCHEMA.commands.keys()


@pytest.mark.asyncio
async def test_the_comparison_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has the `x` itself is answered otherwise, by each command that does not find an absent one."""
    monkeypatch.chdir(tmp_path)
    absent = await answers(tmp_path / "host", filled=False)
    own = await answers(tmp_path / "host", filled=False, own=True)
    missing = [place for place, (_, found) in enumerate(absent)
               if b"object 'x' not found" in found[0] or b"/objects/x' not found" in found[0]]
    assert len({absent[place][0][0] for place in missing}) > 25
    for place in missing:
        assert own[place][1] != absent[place][1], own[place][0]
