"""A change: one path back for whatever ends it early, one forward when it is durable."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from gmemd.authority.ledger import Ledger
from gmemd.changes.change import PARTS, Change, Judged, WithFds, changing
from gmemd.changes.completed import completed
from gmemd.changes.grouped import Grouped
from gmemd.changes.notes import Notes
from gmemd.commands.memdev import added, delete
from gmemd.errors import QmpError
from gmemd.persist.custody import Custody
from gmemd.persist.fdstore import FdStore
from gmemd.persist.notify import Notifier
from gmemd.persist.registry import Registry
from tests.commands.live import LiveMachine
from tests.persist.manager import StandIn

PAGE = os.sysconf("SC_PAGESIZE")


class Kept(LiveMachine):
    """A machine whose objects a service manager keeps, as long as it can be reached."""

    def __init__(self, directory: Path) -> None:
        self.manager = StandIn(directory)
        self.notifier = Notifier(self.manager.address)
        self._registry = Registry(str(directory / "registry"))
        super().__init__(custody=Custody(self._registry, self.notifier, FdStore(1024)))
        self.go_on()

    async def _receive(self) -> None:
        while True:
            self.manager.receive()
            await asyncio.sleep(0.001)

    def cut_off(self) -> None:
        """No flush succeeds any more."""
        self.notifier.close()
        self.lock()

    def lock(self, *, locked: bool = True) -> None:
        """Nothing can be written down, or it can again."""
        self._registry._db.execute(f"PRAGMA query_only = {int(locked)}")

    def hang(self) -> None:
        """The manager answers nothing until `go_on`."""
        self._receiving.cancel()

    def go_on(self) -> None:
        self._receiving = asyncio.create_task(self._receive())

    async def make(self, *names: str) -> None:
        for name in names:
            await completed(self.dispatch("object-add", qom_type="memory-backend-guest-memfd", id=name, size=4 * PAGE))

    async def close(self) -> None:
        self._receiving.cancel()
        await super().close()
        self.gmemd.custody.close()
        self.notifier.close()
        self.manager.close()


@pytest_asyncio.fixture
async def kept(tmp_path: Path) -> AsyncIterator[Kept]:
    made = Kept(tmp_path)
    yield made
    await made.close()


@pytest_asyncio.fixture
async def live() -> AsyncIterator[LiveMachine]:
    made = LiveMachine()
    yield made
    await made.close()


def steps(change: Change, said: list[str], *names: str) -> None:
    for name in names:
        change.undo(lambda name=name: said.append(f"undo {name}"))  # type: ignore[misc]
        change.done(lambda name=name: said.append(f"done {name}"))  # type: ignore[misc]


def run(machine: LiveMachine, command: Callable[[Change], Any]) -> Any:
    """The result of a command that needs nothing but its change."""
    return changing(machine.gmemd.settler, lambda gmemd, caller, arguments, change: command(change))(None, None, {})


def never(change: Change) -> None:
    raise QmpError("refused")


def ending(said: list[str], name: str) -> Callable[[], asyncio.Future[None]]:
    """A step that takes a turn of the loop or two."""
    async def work() -> None:
        await asyncio.sleep(0)
        said.append(name)

    return lambda: asyncio.ensure_future(work())


def test_a_refusal_undoes_the_last_step_first() -> None:
    """Also where nobody keeps, and no loop runs."""
    machine, said = LiveMachine(), list[str]()

    def command(change: Change) -> None:
        steps(change, said, "one", "two")
        raise QmpError("refused")

    with pytest.raises(QmpError, match="refused"):
        run(machine, command)
    assert said == ["undo two", "undo one"]
    machine.gmemd.close()


def test_nobody_keeps_settles_at_once() -> None:
    machine, said = LiveMachine(), list[str]()

    def command(change: Change) -> dict[str, Any]:
        steps(change, said, "one", "two")
        return {"value": 1}

    assert run(machine, command) == {"value": 1}
    assert said == ["done one", "done two"]
    machine.gmemd.close()


async def test_a_step_waits_for_the_one_before(live: LiveMachine) -> None:
    """The reply waits for all of them."""
    said: list[str] = []

    def command(change: Change) -> None:
        steps(change, said, "one")
        change.undo(ending(said, "undo slowly"))
        steps(change, said, "three")
        raise QmpError("refused")

    with pytest.raises(QmpError, match="refused"):
        await completed(run(live, command))
    assert said == ["undo three", "undo slowly", "undo one"]


async def test_a_step_that_fails_holds_up_no_other(live: LiveMachine) -> None:
    said: list[str] = []

    def command(change: Change) -> None:
        steps(change, said, "one")
        change.undo(lambda: never(change))
        steps(change, said, "three")
        raise QmpError("refused")

    with pytest.raises(QmpError, match="refused"):
        run(live, command)
    assert said == ["undo three", "undo one"]


async def test_acknowledged_when_durable(kept: Kept) -> None:
    """The last steps come with the flush, not before."""
    await kept.make("g")
    said: list[str] = []

    def command(change: Change) -> dict[str, Any]:
        steps(change, said, "one")
        change.rewrite(kept.gmemd.objects.find("g"))
        return {}

    result = run(kept, command)
    assert (type(result), said) == (Change, [])
    assert await completed(result) == {}
    assert said == ["done one"]


@pytest.mark.parametrize("long", [False, True])
async def test_a_flush_that_fails_undoes_it(kept: Kept, long: bool) -> None:
    """The record is what it was before, too."""
    await kept.make("g")
    backend, said = kept.gmemd.objects.find("g"), list[str]()
    before = backend.record

    def command(change: Change) -> Any:
        async def work() -> dict[str, Any]:
            await asyncio.sleep(0)
            return act()

        def act() -> dict[str, Any]:
            steps(change, said, "one", "two")
            change.rewrite(backend)
            change.keep(backend.aside or backend)
            return {}

        change.reserve()
        return work() if long else act()

    kept.cut_off()
    with pytest.raises(QmpError):
        await completed(run(kept, command))
    assert said == ["undo two", "undo one"]
    assert backend.record is before


async def test_what_was_settled_stays(kept: Kept) -> None:
    """A later refusal undoes what came after it."""
    await kept.make("g")
    said: list[str] = []

    def command(change: Change) -> Any:
        async def work() -> None:
            steps(change, said, "one")
            change.rewrite(kept.gmemd.objects.find("g"))
            await change.settle()
            steps(change, said, "two")
            raise QmpError("refused")

        return work()

    with pytest.raises(QmpError, match="refused"):
        await completed(run(kept, command))
    assert said == ["done one", "undo two"]


async def test_custody_is_given_all_or_nothing(kept: Kept) -> None:
    """What was noted before the note that is refused is taken back."""
    await kept.make("g")
    backend = kept.gmemd.objects.find("g")
    before = kept.gmemd.custody.room[0]

    def command(change: Change) -> dict[str, Any]:
        change.rewrite(backend)
        change.forget(backend)
        change.reserve()
        change.keep(backend)
        os.close(backend.fd)  # nothing can be kept of that
        return {}

    fd = os.dup(backend.fd)
    with pytest.raises(QmpError, match="Bad file descriptor"):
        run(kept, command)
    os.dup2(fd, backend.fd)
    os.close(fd)
    assert not kept.gmemd.custody.dirty
    assert (kept.gmemd.custody.room[0], backend.record is not None) == (before, True)
    await completed(kept.dispatch("object-del", id="g"))


async def test_no_room_is_left_reserved(kept: Kept) -> None:
    def command(change: Change) -> None:
        change.reserve()
        raise QmpError("refused")

    before = kept.gmemd.custody.room
    for _ in range(3):
        with pytest.raises(QmpError, match="refused"):
            run(kept, command)
    run(kept, lambda change: change.reserve())
    assert kept.gmemd.custody.room == before


async def test_descriptors_leave_when_it_is_durable(kept: Kept) -> None:
    """Those of a reply that is not sent are closed."""
    await kept.make("g")
    reply = await completed(kept.dispatch("memdev-get-fd", id="g", lease="keep"))
    assert type(reply) is WithFds
    os.close(reply.fds[0])
    kept.cut_off()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(QmpError):
        await completed(kept.dispatch("memdev-get-fd", id="g", lease="delete"))
    assert len(os.listdir("/proc/self/fd")) == before
    [lease] = await kept.do("query-memdev-leases")
    assert lease["policy"] == "keep"


async def test_a_refused_deletion_moves_nothing(kept: Kept, tmp_path: Path) -> None:
    """Where nothing can be recorded, what is there and what is lost stays where it stood."""
    await kept.make("m", "n")
    for name in ("k", "l"):
        kept.gmemd.lost[name] = kept.gmemd.objects.find("m").record.changed(id=name)
    os.rename(tmp_path / "registry", tmp_path / "elsewhere")
    (tmp_path / "registry").touch()
    kept._registry.read_only = "it was"
    version = kept.gmemd.objects.version
    for name in ("m", "k"):
        assert "cannot be written" in await kept.refused("object-del", id=name)
    assert [backend.id for backend in kept.gmemd.objects.in_creation_order()] == ["m", "n"]
    assert (list(kept.gmemd.lost), kept.gmemd.objects.version) == (["k", "l"], version)


async def test_an_idle_gmemd_that_nobody_keeps_sleeps(live: LiveMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to be done now and then."""
    monkeypatch.setattr(asyncio.get_running_loop(), "call_later", never)
    live.gmemd.settler.catch_up()


async def test_an_id_is_taken_until_all_is_undone(live: LiveMachine) -> None:
    """Whoever took it before would lose it to the last step."""
    m = {"qom-type": "memory-backend-memfd", "id": "m", "size": PAGE}

    def command(change: Change) -> None:
        gmemd = live.gmemd
        backend = gmemd.objects.begin(gmemd.schema.check_object(m), (0, 0), str)
        change.undo(lambda: gmemd.objects.cancel(backend))
        change.undo(ending([], "memory is given back"))
        added(gmemd, backend, change)
        raise QmpError("refused")

    undoing = run(live, command)
    assert not list(live.gmemd.objects)
    assert "duplicate" in await live.refused("object-add", **m)
    with pytest.raises(QmpError, match="refused"):
        await undoing
    await live.do("object-add", **m)
    assert [backend.id for backend in live.gmemd.objects] == ["m"]


async def test_a_deleted_object_comes_back_though_its_id_was_used_again(kept: Kept) -> None:
    """All of a flush that fails is undone, and undoing what took the id takes longest."""
    await kept.make("m")
    before = kept.gmemd.objects.find("m")
    kept.hang()
    new = {"qom_type": "memory-backend-memfd", "size": PAGE}
    replies = [asyncio.ensure_future(completed(kept.dispatch("object-add", id="n", **new)))]
    while kept.gmemd.custody.dirty:  # what comes now waits for the next flush
        await asyncio.sleep(0)
    replies += [asyncio.ensure_future(completed(result)) for result in (
        kept.dispatch("object-del", id="m"), kept.dispatch("object-add", id="m", prealloc=True, **new))]
    while kept.gmemd.objects.get("m") in (None, before):
        await asyncio.sleep(0.001)
    kept.lock()
    kept.go_on()
    acknowledged, *others = await asyncio.gather(*replies, return_exceptions=True)
    assert acknowledged == {}
    assert all(isinstance(error, QmpError) for error in others)
    assert sorted(backend.id for backend in kept.gmemd.objects) == ["m", "n"]
    assert kept.gmemd.objects.find("m") is before
    kept.lock(locked=False)
    await completed(kept.dispatch("object-del", id="m"))
    await kept.make("m")


@pytest.mark.parametrize("new", [{"qom_type": "memory-backend-memfd", "size": PAGE, "prealloc": True},
                                 {"qom_type": "thread-context"}], ids=["memory", "context"])
async def test_what_comes_back_has_its_id(live: LiveMachine, new: dict[str, Any]) -> None:
    """Making the next one of that id takes its time, and the deletion before it is undone meanwhile."""
    await live.do("object-add", id="m", qom_type="memory-backend-memfd", size=PAGE)
    before, change = live.gmemd.objects.find("m"), Change(live.gmemd.settler)
    delete(live.gmemd, "m", change)
    adding = live.dispatch("object-add", id="m", **new)
    change.revert()
    with pytest.raises(QmpError, match="duplicate"):
        await completed(adding)
    assert (list(live.gmemd.objects.listed()), live.gmemd.objects.sums["memory-backend-memfd"]) == ([before], [1, PAGE])
    await live.do("object-del", id="m")
    await live.do("object-add", id="m", **new)


async def test_claims(live: LiveMachine) -> None:
    """One may claim it alone, or several to read; whoever comes hears who has it."""
    await live.do("object-add", qom_type="memory-backend-memfd", id="m", size=PAGE)
    backend, settler = live.gmemd.objects.find("m"), live.gmemd.settler
    one, two, three = (Change(settler) for _ in range(3))
    one.claim(backend, "it is being hashed", shared=True)
    two.claim(backend, "it is being copied", shared=True)
    with pytest.raises(QmpError, match="object 'm' is busy: it is being hashed"):
        three.claim(backend, "it is being wiped")
    with pytest.raises(QmpError, match="busy"):
        await live.do("object-del", id="m")
    one.unclaim()
    with pytest.raises(QmpError, match="object 'm' is busy: it is being copied"):
        three.claim(backend, "it is being wiped")
    two.unclaim()
    three.claim(backend, "it is being wiped")
    with pytest.raises(QmpError, match="object 'm' is busy: it is being wiped"):
        one.claim(backend, "it is being hashed", shared=True)
    three.unclaim()
    await live.do("object-del", id="m")


async def test_a_claim_goes_on_with_the_job(live: LiveMachine) -> None:
    """What is handed over is no longer the command's, whatever becomes of that."""
    await live.do("object-add", qom_type="memory-backend-memfd", id="m", size=PAGE)
    backend, said = live.gmemd.objects.find("m"), list[str]()
    first = Change(live.gmemd.settler)
    first.claim(backend, "it is being wiped")
    steps(first, said, "one")
    own = first.hand_over()
    assert first.conclude({}) == {}
    assert (said, backend.busy) == ([], "it is being wiped")
    own.revert()
    own.unclaim()
    assert (said, backend.busy) == (["undo one"], "")


def test_all_of_a_change_is_handed_over() -> None:
    """Whatever it consists of, but for the settler that both have."""
    machine = LiveMachine()
    parts = {name for kind in (Notes, Change) for name, value in vars(kind).items() if not callable(value)}
    parts |= getattr(Change(machine.gmemd.settler), "__dict__", {}).keys()  # a compiled one has none
    machine.gmemd.close()
    assert {name for name in parts if not name.startswith("__")} - {"_settler"} == set(PARTS)


def test_a_trial_ends_where_it_would_act() -> None:
    machine = LiveMachine()
    change = Change(machine.gmemd.settler)
    change.dry_run = True
    with pytest.raises(Judged) as caught:
        change.judged("do it")
    assert (caught.value.effect, caught.value.whole) == ("do it", True)
    Change(machine.gmemd.settler).judged("do it")
    machine.gmemd.close()


def test_equal_charges_are_each_given_back_once() -> None:
    """What was charged for the time of a command of a transaction is told apart from what stays charged."""
    machine, ledger = LiveMachine(), Ledger()
    change = Grouped(machine.gmemd.settler, ledger.budget("uid:0", {"objects": 3}))
    change.charge({"objects": 1})
    change.charge({"objects": 1}, meanwhile=True)
    [account] = ledger
    assert account.used("objects") == 2
    change.unclaim_own()
    assert account.used("objects") == 1
    change.revert()
    assert account.used("objects") == 0
    machine.gmemd.close()
