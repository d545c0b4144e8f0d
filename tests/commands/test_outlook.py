"""systemd is asked, asked again when its answer may have changed, and what it has dropped is stored again."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gmemd.changes.completed import completed
from gmemd.commands import outlook
from gmemd.commands.outlook import Outlook
from gmemd.persist.carried import newest
from gmemd.persist.custody import Custody
from gmemd.persist.fdstore import FdStore
from gmemd.persist.keeping import Keeping, Unit
from gmemd.persist.notify import Notifier
from gmemd.persist.registry import Registry
from tests.commands.live import LiveMachine
from tests.patience import PATIENCE
from tests.persist.manager import StandIn

SIZE = 1 << 16


class Systemd:
    """systemd as it is asked and as it keeps: a stand-in whose settings a test changes."""

    def __init__(self, directory: Path) -> None:
        self.store = StandIn(directory)
        self.unit: Unit | None = Unit()
        self.mark = 1
        self.asked = 0
        self.keeping = Keeping()
        self.hangs_on = -1  # a descriptor that it reads before it answers

    def ask(self) -> Unit | None:
        self.asked += 1
        if self.hangs_on >= 0:
            os.read(self.hangs_on, 1)
        self.store.receive()
        return self.unit and self.unit._replace(stored=len(self.store.store), limit=self.store.limit)

    def status_changed(self) -> None: ...

    def reload(self, limit: int | None = None, **changed: Any) -> None:
        """Take other settings, and drop what is over the limit."""
        assert self.unit is not None
        self.unit = self.unit._replace(**changed)
        self.store.limit = self.store.limit if limit is None else limit
        for name, _ in self.store.store[self.store.limit:]:
            self.store._drop([name])
        self.mark += 1


@asynccontextmanager
async def living(directory: Path, patience: float = PATIENCE, *,
                 old: bool = False, live_update: bool = False) -> AsyncIterator[tuple[LiveMachine, Systemd, list[str]]]:
    """A daemon's machine whose memory such a systemd keeps."""
    systemd, told = Systemd(directory), list[str]()
    systemd.keeping = Keeping("systemd", old=old, live_update=live_update)
    notifier = Notifier(systemd.store.address)
    custody = Custody(Registry(str(directory / "registry")), notifier, FdStore(1024),
                      carries=live_update)
    machine = LiveMachine(custody=custody, manager=systemd)
    gmemd = machine.gmemd
    gmemd._outlook = Outlook(gmemd.settler, systemd, machine.spawn, gmemd.kept, tell=told.append,
                            mark=lambda: systemd.mark, patience=patience)
    receiving = asyncio.create_task(receive(systemd))
    try:
        yield machine, systemd, told
    finally:
        receiving.cancel()
        custody.close()
        gmemd.close()
        notifier.close()
        systemd.store.close()


async def receive(systemd: Systemd) -> None:
    """Take what it is sent, as systemd does."""
    while True:
        systemd.store.receive()
        await asyncio.sleep(0.001)


async def add(machine: LiveMachine, *names: str) -> None:
    for name in names:
        await completed(machine.dispatch("object-add", qom_type="memory-backend-memfd", id=name, size=SIZE))


async def answers(machine: LiveMachine, *events: str) -> list[str]:
    """What is said of the first object for these events."""
    [status, *_] = await machine.do("query-memdev-status")
    said = {fate["event"]: fate["answer"] for fate in status["survival"]}
    return [said[event] for event in events]


EVENTS = ("gmemd-crash", "service-stop")


async def test_it_is_asked_before_the_first_answer_and_after_a_reload(tmp_path: Path) -> None:
    """A change that was reloaded is in the next answer; where nothing can have changed nobody is asked."""
    async with living(tmp_path) as (machine, systemd, told):
        await add(machine, "a")
        assert await answers(machine, *EVENTS) == ["yes", "yes"]
        asked = systemd.asked
        assert await answers(machine, *EVENTS) == ["yes", "yes"]
        assert systemd.asked == asked
        systemd.reload(preserve="no")
        assert await answers(machine, *EVENTS) == ["no", "no"]
        systemd.reload(preserve="yes", referred=False)
        assert await answers(machine, *EVENTS) == ["yes", "no"]
        assert told == []


async def test_what_was_let_go_of_is_given_again(tmp_path: Path) -> None:
    """All of it, with the right names; said once."""
    async with living(tmp_path) as (machine, systemd, told):
        await add(machine, "a", "b")
        before = sorted(systemd.store.names())
        assert len(before) == 2
        systemd.reload(limit=0)
        assert await answers(machine, *EVENTS) == ["no", "no"]
        assert "does not hold 2 descriptors" in told[-1]
        systemd.reload(limit=9)
        assert await answers(machine, *EVENTS) == ["yes", "yes"]
        assert sorted(systemd.store.names()) == before
        assert told[-1] == "systemd had dropped 2 descriptors; they were stored again"
        fds = dict(systemd.store.store)
        for name in ("a", "b"):
            backend = machine.gmemd.objects.find(name)
            assert os.path.sameopenfile(fds[backend.record.fd_name], backend.fd)


async def test_what_there_is_no_room_for_is_not_said_to_survive(tmp_path: Path) -> None:
    """Which objects systemd dropped under a lower maximum is unknown; the next object is refused."""
    async with living(tmp_path) as (machine, systemd, _):
        await add(machine, "a", "b", "c")
        systemd.reload(limit=2)
        assert await answers(machine, *EVENTS) == ["no", "no"]
        assert "keeps at most 2 file descriptors" in await machine.refused(
            "object-add", **{"qom-type": "memory-backend-memfd", "id": "d", "size": SIZE})


async def test_fewer_descriptors_for_the_next_start(tmp_path: Path) -> None:
    """LimitNOFILE= is counted as it is set now, not as it was at the start."""
    async with living(tmp_path) as (machine, systemd, _):
        await add(machine, "a", "b")
        systemd.reload(nofile=65)
        assert await answers(machine, *EVENTS) == ["no", "no"]
        assert "the next start can be given at most 1 file descriptors" in await machine.refused(
            "object-add", **{"qom-type": "memory-backend-memfd", "id": "d", "size": SIZE})
        systemd.reload(nofile=66)
        assert await answers(machine, *EVENTS) == ["yes", "yes"]


async def test_silence_is_unknown(tmp_path: Path) -> None:
    """Whoever does not answer has said nothing, and what he said before does not count."""
    async with living(tmp_path) as (machine, systemd, _):
        await add(machine, "a")
        assert await answers(machine, *EVENTS) == ["yes", "yes"]
        unit, systemd.unit = systemd.unit, None
        systemd.mark += 1
        assert await answers(machine, *EVENTS) == ["unknown", "unknown"]
        systemd.unit = unit
        systemd.mark += 1
        assert await answers(machine, *EVENTS) == ["yes", "yes"]


async def test_a_limit_that_nobody_tells_is_said(tmp_path: Path) -> None:
    """Before systemd 254, and where it cannot be asked, the operator is told what is assumed."""
    async with living(tmp_path, old=True) as (machine, systemd, told):
        systemd.unit = None
        await add(machine, "a")
        assert await answers(machine, *EVENTS) == ["unknown", "no"]
        assert ["1024 are assumed" in words for words in told] == [True]


async def test_nobody_waits_for_a_bus_that_hangs(tmp_path: Path) -> None:
    """The answer comes without it, and is right again when it answers."""
    async with living(tmp_path, patience=0.05) as (machine, systemd, _):
        await add(machine, "a")
        systemd.hangs_on, end = os.pipe()
        assert await answers(machine, *EVENTS) == ["unknown", "unknown"]
        os.close(end)
        while await answers(machine, *EVENTS) == ["unknown", "unknown"]:
            pass
        assert await answers(machine, *EVENTS) == ["yes", "yes"]
        os.close(systemd.hangs_on)


def copied(systemd: Systemd) -> set[str]:
    """The objects that the copy of the registry in the store knows; none without one."""
    copy = newest(systemd.store.store)
    return set() if copy is None else {record.id for record in copy.records()}


async def test_the_registry_is_copied_when_nothing_changes_any_more(tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """At the start and after a quiet tick, so that a daemon that is killed has it in the store."""
    async with living(tmp_path, live_update=True) as (machine, systemd, _), asyncio.timeout(PATIENCE):
        monkeypatch.setattr(outlook, "TICK", 0.05)
        machine.gmemd.outlook.start()
        machine.gmemd.settler.catch_up()
        while newest(systemd.store.store) is None:
            await asyncio.sleep(0.005)
        await add(machine, "a", "b")
        while copied(systemd) != {"a", "b"}:
            await asyncio.sleep(0.005)
        await completed(machine.dispatch("object-del", id="a"))
        while copied(systemd) != {"b"}:
            await asyncio.sleep(0.005)
        assert len(systemd.store.store) == 2


async def test_a_kexec_is_survived_where_everything_is_there(tmp_path: Path) -> None:
    """The host, the settings, the registry's copy, and memory for the holes."""
    async with living(tmp_path, live_update=True) as (machine, systemd, _):
        assert systemd.unit is not None
        systemd.unit = systemd.unit._replace(kexec=("yes", ""))
        await add(machine, "a")
        assert await answers(machine, "kexec") == ["no"]  # there is no copy yet
        machine.gmemd.custody.copies.ask(machine.gmemd.kept)
        await machine.gmemd.settler.flush()
        assert await answers(machine, "kexec") == ["yes"]
        await completed(machine.dispatch("object-add", qom_type="memory-backend-memfd", id="sparse", size=1 << 45))
        await asyncio.sleep(1.1)  # the sum of all holes is a second old at most
        [status] = await machine.do("query-memdev-status", id="a")
        [kexec] = [fate for fate in status["survival"] if fate["event"] == "kexec"]
        assert kexec["advice"].startswith("a live update fills the holes of sparse memory: it would allocate 3518")
