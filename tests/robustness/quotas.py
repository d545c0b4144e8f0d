"""The ledger against reality: clients with limits do what they can, flushes fail, the daemon is killed; after each step
every account has exactly what its objects, jobs and descriptors add up to, and nothing is above a limit.

In one process: the daemon's parts are real, as are its registry, the memory and what the service manager would hold.
"""

from __future__ import annotations

import _thread
import asyncio
import errno
import gc
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from gmemd.authority.ledger import Budget, Ledger
from gmemd.authority.rights import ALL
from gmemd.changes.change import WithFds
from gmemd.changes.completed import completed
from gmemd.commands.charging import charge_again
from gmemd.commands.context import Gmemd
from gmemd.commands.dispatch import Dispatcher
from gmemd.commands.returning import adopt_restored
from gmemd.errors import QmpError
from gmemd.kernel.choose import choose_kernel
from gmemd.kernel.program import worker_program
from gmemd.objects.fds import NamedFds
from gmemd.persist.registry import NotWritten
from gmemd.qmp.session import Request, Session
from gmemd.schema.validate import Schema
from tests.patience import PATIENCE
from tests.persist.world import World

PAGE = os.sysconf("SC_PAGESIZE")
LIMITS = {"bytes": 40 * PAGE, "objects": 5, "fds-held": 3, "jobs": 2, "resident": 24 * PAGE}
ACCOUNTS = {11: "uid:11", 12: "uid:12", 13: "rule:both", 14: "rule:both"}  # by uid of the client
IDS = tuple("abcdef")
MEMFD, GUEST = "memory-backend-memfd", "memory-backend-guest-memfd"

steps: Counter[str] = Counter()  # by rule and how it ended, of all machines in this process
others = [0]  # how many threads there are besides those of a machine


class Killed(BaseException):
    """The daemon ends here."""


class Client:
    """A client of one uid."""

    def __init__(self, uid: int, gmemd: Gmemd, usable: Any) -> None:
        assert gmemd.ledger is not None
        self.uid, self.pid, self.rights, self.usable, self.room = uid, os.getpid(), ALL, usable, gmemd
        self.session = Session(gmemd.version)
        self.session.negotiate([])
        self.named_fds = NamedFds()
        self.budget: Budget = gmemd.ledger.budget(ACCOUNTS[uid], LIMITS)
        self.budget.account.sources.add(self)
        self.sent: list[int] = []

    def holds(self, what: str) -> int:
        return sum(name in self.named_fds for name in IDS) if what == "fds-held" else 0

    def is_gone(self) -> bool:
        return False

    def take_fd(self) -> int:
        if not self.sent:
            raise QmpError("No file descriptor supplied via SCM_RIGHTS")
        return self.sent.pop()


class Quotas(RuleBasedStateMachine):
    """`world` outlives the daemon, whose parts are `gmemd` and `clients`."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(lambda loop, context: None)  # a kill ends in the middle of a flush
        self.directory = tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
        self.world = World(Path(self.directory) / "world", 64)
        self.creators: dict[str, int] = {}  # uid by id
        self._start()

    def teardown(self) -> None:
        self._kill()
        self.world.manager.close()
        self.loop.close()
        shutil.rmtree(self.directory)

    # -- the daemon -----------------------------------------------------------------------------

    def emit(self, name: str, data: dict[str, Any]) -> None: ...

    def emit_in(self, room: Gmemd, name: str, data: dict[str, Any]) -> None: ...

    def stop(self) -> None: ...

    def spawn(self, work: Any) -> None:
        self.tasks.add(self.loop.create_task(work))

    def _start(self) -> None:
        self.outside = _memfds() - self._stored()
        custody = self.world.start()
        self.world.memory.clear()  # they are the daemon's
        self.tasks: set[asyncio.Task[None]] = set()
        self.jobs: dict[str, int] = {}
        self.in_sets: list[tuple[int, int, int]] = []  # set, fd, uid
        self.gmemd = Gmemd(schema=_schema(), kernel=choose_kernel("simulated"), version={}, host=self, custody=custody,
                           ledger=Ledger())
        adopt_restored(self.gmemd, self.world.restored)
        charge_again(self.gmemd)
        self.dispatcher = Dispatcher(self.gmemd)
        usable = self.dispatcher.usable(ALL)
        self.clients = {uid: Client(uid, self.gmemd, usable) for uid in ACCOUNTS}
        self.serving = self.loop.create_task(self._serve())
        self.loop.run_until_complete(self._drop_old())
        self.besides = len(_open()) - self._expected()  # registry, sockets, ...

    async def _serve(self) -> None:
        while True:
            self.world.manager.receive()
            await asyncio.sleep(0)

    async def _drop_old(self) -> None:
        """Let go of what a predecessor has not acknowledged, or has deleted."""
        self.gmemd.settler.catch_up()
        await self.gmemd.settler.idle()
        await self._until(lambda: _thread._count() <= others[0])

    def _kill(self) -> None:
        self.world.hook = lambda step: None
        tasks = [*self.tasks, self.serving, *asyncio.all_tasks(self.loop)]
        for task in tasks:
            task.cancel()
        self.loop.run_until_complete(asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), PATIENCE))
        self.loop.run_until_complete(self._until(lambda: _thread._count() <= others[0]))
        self.world.crash()
        self.gmemd.kernel.close()
        for fd in _memfds() - self.outside - self._stored():  # as when a process ends
            os.close(fd)

    def _stored(self) -> set[int]:
        return {fd for _, fd in self.world.manager.store}

    # -- what clients do ------------------------------------------------------------------------

    def _begin(self, uid: int, command: str, /, **arguments: Any) -> Any:
        client = self.clients[uid]
        given = {name.replace("_", "-"): value for name, value in arguments.items()}
        return self.dispatcher.run(Request(command, given, None), client.session, client)

    async def _end(self, result: Any) -> Any:
        async with asyncio.timeout(PATIENCE):
            done = await completed(result)
        if isinstance(done, WithFds):
            for fd in done.fds:
                os.close(fd)
            return done.value
        return done

    def _all(self, *requests: tuple[int, str, dict[str, Any]]) -> list[Any]:
        """Carry out requests of which each is begun before the one before it has ended: results, or None if refused."""
        async def run() -> list[Any]:
            begun = []
            for uid, command, arguments in requests:
                try:
                    result = self._begin(uid, command, **arguments)
                    begun.append(asyncio.ensure_future(self._end(result)))
                except QmpError as exc:
                    begun.append(exc)
            return [await self._result(one) for one in begun]

        found = self.loop.run_until_complete(run())
        for (_, command, _), result in zip(requests, found, strict=True):
            steps[f"{command} {'refused' if isinstance(result, QmpError) else 'done'}"] += 1
            if isinstance(result, QmpError) and result.desc.startswith("the quota of"):
                steps["above a limit"] += 1
        return [None if isinstance(result, QmpError) else result for result in found]

    @staticmethod
    async def _result(one: Any) -> Any:
        try:
            return one if isinstance(one, QmpError) else await one
        except QmpError as exc:
            return exc

    def _do(self, uid: int, command: str, /, **arguments: Any) -> Any:
        return self._all((uid, command, arguments))[0]

    UID = st.sampled_from(sorted(ACCOUNTS))
    ID = st.sampled_from(IDS)
    NTH = st.integers(0, 5)

    @rule(uid=UID, id_=ID, pages=st.integers(1, 16), kind=st.sampled_from((MEMFD, GUEST)),
          prealloc=st.integers(0, 5))
    def add(self, uid: int, id_: str, pages: int, kind: str, prealloc: int) -> None:
        if self._do(uid, "object-add", qom_type=kind, id=id_, size=pages * PAGE, prealloc=not prealloc) is not None:
            self.creators[id_] = uid

    @rule(uid=UID, id_=ID)
    def add_what_fails(self, uid: int, id_: str) -> None:
        """It is judged and charged, and then the kernel refuses it."""
        self._do(uid, "object-add", qom_type=MEMFD, id=id_, size=PAGE + 1)

    @rule(first=UID, second=UID, id_=ID, other=ID, pages=st.integers(1, 30))
    def add_at_once(self, first: int, second: int, id_: str, other: str, pages: int) -> None:
        """Two that fit each, but perhaps not both."""
        found = self._all(*((uid, "object-add", {"qom_type": MEMFD, "id": one, "size": pages * PAGE})
                            for uid, one in ((first, id_), (second, other))))
        for uid, one, result in zip((first, second), (id_, other), found, strict=True):
            if result is not None:
                self.creators[one] = uid

    @rule(uid=UID, id_=ID, force=st.booleans())
    def delete(self, uid: int, id_: str, force: bool) -> None:
        self._do(uid, "memdev-delete", id=id_, force=True) if force else self._do(uid, "object-del", id=id_)

    @rule(uid=UID, id_=ID, pages=st.integers(1, 16))
    def replace(self, uid: int, id_: str, pages: int) -> None:
        """Deleted and created again within one flush: both are charged until it is over."""
        found = self._all((uid, "object-del", {"id": id_}),
                          (uid, "object-add", {"qom_type": MEMFD, "id": id_, "size": pages * PAGE}))
        if found[1] is not None:
            self.creators[id_] = uid

    @rule(uid=UID, nth=NTH, id_=ID, copies=st.integers(0, 20))
    def clone(self, uid: int, nth: int, id_: str, copies: int) -> None:
        templates = [backend.id for backend in self.gmemd.objects if backend.visibility is None]
        if templates:
            template = templates[nth % len(templates)]
            self._do(uid, "memdev-freeze", id=template)
            if self._do(uid, "memdev-clone", template=template, id=id_, copy=not copies) is not None:
                self.creators[id_] = uid

    @rule(uid=UID, nth=NTH, to=st.sampled_from(("private", "private", "shared")), preserve=st.booleans())
    def convert(self, uid: int, nth: int, to: str, preserve: bool) -> None:
        """With `preserve` there is memory beside the object's from the first time on that there is content."""
        guests = [backend.id for backend in self.gmemd.objects if backend.visibility is not None]
        if guests:
            self.write(guests[nth % len(guests)])
            self._do(uid, "memdev-convert", id=guests[nth % len(guests)], offset=0, size=PAGE, to=to, preserve=preserve)

    @rule(id_=ID)
    def write(self, id_: str) -> None:
        """Somebody who has the memory writes to it."""
        backend = self.gmemd.objects.get(id_)
        if backend is not None and not backend.frozen:
            os.pwrite(backend.fd, b"x", 0)
            steps["write"] += 1

    @rule(uid=UID, id_=ID, persist=st.booleans())
    def persist(self, uid: int, id_: str, persist: bool) -> None:
        self._do(uid, "memdev-persist", id=id_, persist=persist)

    @rule(uid=UID, command=st.sampled_from(("object-add", "object-del", "memdev-clone")), id_=ID, other=ID)
    def foretell(self, uid: int, command: str, id_: str, other: str) -> None:
        """A dry run charges nothing in the end."""
        arguments = {"object-add": {"qom-type": MEMFD, "id": id_, "size": 9 * PAGE}, "object-del": {"id": id_},
                     "memdev-clone": {"template": other, "id": id_}}[command]
        self._all((uid, "query-command-effect", {"command": command, "arguments": arguments}))

    @rule(uid=UID, id_=ID, job=st.sampled_from(("j1", "j2", "j3")))
    def populate(self, uid: int, id_: str, job: str) -> None:
        if self._do(uid, "memdev-populate", id=id_, job_id=job) is not None:
            self.jobs[job] = uid
            self.loop.run_until_complete(asyncio.wait_for(asyncio.gather(*self.tasks), PATIENCE))
            self.tasks.clear()

    @rule(uid=UID, job=st.sampled_from(("j1", "j2", "j3")))
    def dismiss(self, uid: int, job: str) -> None:
        if self._do(uid, "job-dismiss", id=job) is not None:
            del self.jobs[job]

    @rule(uid=UID, name=st.sampled_from(IDS[:4]), size=st.integers(0, 6))
    def send(self, uid: int, name: str, size: int) -> None:
        """A descriptor of memory, or of one that is no memory."""
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.truncate(fd, size * PAGE)
        self.clients[uid].sent = [fd]
        self._do(uid, "getfd", fdname=name)
        self._forget_sent(uid)

    @rule(uid=UID, name=st.sampled_from(IDS[:4]), id_=ID)
    def send_again(self, uid: int, name: str, id_: str) -> None:
        """The memory of an object, which may be adopted as another."""
        backend = self.gmemd.objects.get(id_)
        if backend is not None:
            self.clients[uid].sent = [os.dup(backend.fd)]
            self._do(uid, "getfd", fdname=name)
            self._forget_sent(uid)

    @rule(uid=UID, name=st.sampled_from(IDS[:4]), id_=ID, source=ID)
    def adopt(self, uid: int, name: str, id_: str, source: str) -> None:
        self.send_again(uid, name, source)
        if self._do(uid, "memdev-adopt", fdname=name, id=id_, require_seals=False) is not None:
            self.creators[id_] = uid

    @rule(uid=UID, name=st.sampled_from(IDS[:4]))
    def close_name(self, uid: int, name: str) -> None:
        self._do(uid, "closefd", fdname=name)

    @rule(uid=UID)
    def add_to_set(self, uid: int) -> None:
        self.clients[uid].sent = [os.memfd_create("s", os.MFD_CLOEXEC)]
        found = self._do(uid, "add-fd")
        self._forget_sent(uid)
        if found is not None:
            self.in_sets.append((found["fdset-id"], found["fd"], uid))

    @precondition(lambda self: self.in_sets)
    @rule(uid=UID, data=st.data())
    def remove_from_set(self, uid: int, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.in_sets))
        self._do(uid, "remove-fd", fdset_id=entry[0], fd=entry[1])
        self.in_sets.remove(entry)

    def _forget_sent(self, uid: int) -> None:
        for fd in self.clients[uid].sent:
            os.close(fd)
        self.clients[uid].sent = []

    # -- what goes wrong ------------------------------------------------------------------------

    @rule(uid=UID, id_=ID, other=ID, pages=st.integers(1, 16), nth=st.integers(0, 3), full=st.booleans())
    def flush_fails(self, uid: int, id_: str, other: str, pages: int, nth: int, full: bool) -> None:
        """What one turn has changed is undone, or some of it."""
        left = [nth]

        def fail(step: str) -> None:
            wanted = step.startswith("before transaction" if full else "before FDSTORE")
            left[0] -= wanted
            if wanted and left[0] == -1:
                raise NotWritten("full") if full else OSError(errno.ENOBUFS, "")

        self.world.hook = fail
        found = self._all((uid, "object-del", {"id": other}),
                          (uid, "object-add", {"qom_type": MEMFD, "id": id_, "size": pages * PAGE}))
        self.world.hook = lambda step: None
        if found[1] is not None:
            self.creators[id_] = uid
        steps["flush fails"] += 1

    @rule(uid=UID, id_=ID, other=ID, pages=st.integers(1, 16), nth=st.integers(0, 9))
    def killed(self, uid: int, id_: str, other: str, pages: int, nth: int) -> None:
        """In the middle of a flush; what comes back is charged as it was."""
        left = [nth]

        def die(step: str) -> None:
            left[0] -= 1
            if left[0] < 0:
                steps["killed in a flush"] += left[0] == -1
                raise Killed

        self.world.hook = die

        async def run() -> None:
            for command, arguments in (("object-del", {"id": other}),
                                       ("object-add", {"qom_type": MEMFD, "id": id_, "size": pages * PAGE})):
                try:
                    self.tasks.add(asyncio.ensure_future(self._end(self._begin(uid, command, **arguments))))
                except QmpError:
                    continue
            for _ in range(20):
                await asyncio.sleep(0)

        before = self.creators.get(id_)
        self.loop.run_until_complete(run())
        steps["killed"] += 1
        self._kill()
        self._start()
        backend = self.gmemd.objects.get(id_)
        if backend is not None:
            self.creators[id_] = backend.owner[0]
            assert backend.owner[0] in (uid, before)

    # -- what holds -----------------------------------------------------------------------------

    @invariant()
    def ledger_is_reality(self) -> None:
        """Each account has what there is of it, and no more than it may have."""
        self.loop.run_until_complete(self._quiet())
        assert self.gmemd.ledger is not None
        real = self._reality()
        for account in self.gmemd.ledger:
            used = {what: account.used(what) for what in LIMITS}
            there = {what: real[account.name][what] for what in LIMITS}
            assert used == there, f"{account.name} is charged {used}, and has {there}"
            assert len(account.objects) == used["objects"]
            assert all(used[what] <= limit for what, limit in LIMITS.items()), (account.name, used)

    async def _quiet(self) -> None:
        """Wait until nothing is under way, and what is no longer needed is closed."""
        await self.gmemd.settler.idle()
        await self._until(lambda: _thread._count() <= others[0]
                          and len(_open()) <= self.besides + self._expected())

    async def _until(self, holds: Callable[[], bool]) -> None:
        end = self.loop.time() + PATIENCE
        while not holds():
            assert self.loop.time() < end, (f"{_thread._count()} threads of {others[0]}, besides {self.besides} "
                                            f"and {self._expected()} expected: {_links()}")
            await asyncio.sleep(0.0005)

    def _expected(self) -> int:
        """The descriptors that there have to be: of memory, from clients, and in the store."""
        return (sum(len(backend.pieces()) for backend in self.gmemd.objects) + len(self.in_sets)
                + sum(client.holds("fds-held") for client in self.clients.values()) + len(self.world.manager.store))

    def _reality(self) -> dict[str, Counter[str]]:
        """What the accounts have, from the objects, jobs and descriptors themselves."""
        real = {name: Counter[str]() for name in ACCOUNTS.values()}
        seen = set()
        for backend in self.gmemd.objects:
            account = ACCOUNTS[self.creators[backend.id]]
            real[account]["objects"] += 1
            for piece in backend.pieces():
                status = os.fstat(piece.fd)
                if (account, status.st_ino) not in seen:
                    seen.add((account, status.st_ino))
                    real[account]["bytes"] += status.st_size
        for uid in self.jobs.values():
            real[ACCOUNTS[uid]]["jobs"] += 1
        for uid, client in self.clients.items():
            real[ACCOUNTS[uid]]["fds-held"] += client.holds("fds-held")
        for _, _, uid in self.in_sets:
            real[ACCOUNTS[uid]]["fds-held"] += 1
        return real


def _open() -> set[int]:
    """The descriptors of this process."""
    return {int(name) for name in os.listdir("/proc/self/fd")}


def _links() -> dict[int, str]:
    """What they are of."""
    found = {}
    for fd in _open():
        with suppress(OSError):  # that of the list has gone
            found[fd] = os.readlink(f"/proc/self/fd/{fd}")
    return found


def _memfds() -> set[int]:
    return {fd for fd, link in _links().items() if link.startswith("/memfd:")}


_SCHEMA: list[Schema] = []


def _schema() -> Schema:
    if not _SCHEMA:
        _SCHEMA.append(Schema.load())
    return _SCHEMA[0]


def run(wanted: int, length: int = 50) -> Counter[str]:
    """Take so many steps, in machines of `length` steps; how often each ended how."""
    others[0] = _thread._count()
    worker_program()
    Quotas().teardown()  # both open what stays open
    steps.clear()
    before = len(_open())
    machines = -(-wanted // length)
    run_state_machine_as_test(Quotas, settings=settings(
        max_examples=machines, stateful_step_count=length, deadline=None, database=None, derandomize=True,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck)))
    gc.collect()
    assert len(_open()) == before, f"descriptors are left: {_links()}"
    return steps
