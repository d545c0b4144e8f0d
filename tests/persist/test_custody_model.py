"""Custody against a model: whatever is done, fails or crashes, what a restart finds is what was promised."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gmemd.errors import QmpError
from gmemd.persist.batch import Operation
from gmemd.persist.record import Record
from gmemd.persist.registry import NotWritten
from gmemd.persist.waits import NotKept
from tests.persist.manager import KeeperAsManager
from tests.persist.world import World

IDS = st.sampled_from("abcde")
LIMIT = 3
Objects = dict[str, tuple[Record, int]]  # record and inode


class CustodyModel(RuleBasedStateMachine):
    """`objects` is the daemon's memory, `kept` what it has promised."""

    keeper = False  # it is the manager

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.mkdtemp()
        manager = KeeperAsManager(LIMIT, sure=1) if self.keeper else None
        self.world = World(Path(self.directory) / "world", LIMIT, manager=manager)
        self.world.start()
        self.objects: Objects = {}
        self.kept: Objects = {}
        self.before: dict[int, tuple[Operation, Record | None]] = {}  # what an undo brings back

    def teardown(self) -> None:
        self.world.close()
        shutil.rmtree(self.directory)

    # -- what a daemon does
    def note(self, operation: Operation, old: Record | None = None) -> None:
        self.before[id(operation)] = (operation, old)

    @rule(id_=IDS)
    def add(self, id_: str) -> None:
        if id_ in self.objects:
            return
        try:
            operation = self.world.add(id_)
        except QmpError:
            assert len(self.objects) + self.owed() >= LIMIT
            return
        assert len(self.objects) < LIMIT
        self.objects[id_] = (operation.record, operation.record.st_ino)
        self.note(operation)

    def owed(self) -> int:
        """Entries that a failed flush could not take back yet."""
        return len(self.world.custody._delivery.owed)

    @rule(id_=IDS)
    def remove(self, id_: str) -> None:
        if id_ in self.objects:
            record, _ = self.objects.pop(id_)
            self.note(self.world.custody.remove(record), record)

    @rule(id_=IDS, version=st.integers(1, 9))
    def update(self, id_: str, version: int) -> None:
        if id_ in self.objects:
            old, inode = self.objects[id_]
            new = old.changed(extra={"version": version})
            self.objects[id_] = (new, inode)
            self.note(self.world.custody.update(new), old)

    # -- how it ends
    @rule()
    def flush(self) -> None:
        self.world.custody.retry()
        self.world.flush()
        self.promise()
        assert len(self.world.manager.names()) == len(self.kept)

    @rule(nth=st.integers(0, 8), kind=st.sampled_from(["os", "sqlite", "no answer"]))
    def flush_fails(self, nth: int, kind: str) -> None:
        """The n-th step that can fail so does so."""
        left = [nth]

        def fail(step: str) -> None:
            wanted = "transaction" in step if kind == "sqlite" else step.startswith("before ") and "=" in step
            left[0] -= wanted
            if wanted and left[0] == -1:
                raise NotWritten("full") if kind == "sqlite" else OSError(errno.ENOBUFS, "")

        if kind != "no answer":
            self.world.hook = fail
        try:
            flush = self.world.custody.flush()
            self.world.run(flush, (lambda wait: False) if kind == "no answer" else None)
        except NotKept as exc:
            for operation in exc.undone:
                self.undo(operation)
        self.world.hook = lambda step: None
        self.promise()

    @precondition(lambda self: self.keeper)
    @rule()
    def keeper_is_short(self) -> None:
        """It takes nothing, and says so: what is added does not stand."""
        kept = self.world.manager.kept
        kept.limit = 0
        try:
            self.world.run(self.world.custody.flush())
        except NotKept as exc:
            for operation in exc.undone:
                self.undo(operation)
        kept.limit = LIMIT
        assert {record.fd_name for record, _ in self.objects.values()} <= set(self.world.manager.names())
        self.promise()

    def undo(self, operation: Operation) -> None:
        _, old = self.before[id(operation)]
        id_ = operation.record.id
        if operation.kind == "add":
            assert self.objects.pop(id_)[0].seq == operation.record.seq
        else:
            assert old is not None
            assert (id_ in self.objects) == (operation.kind == "update")
            self.objects[id_] = (old, old.st_ino)

    def promise(self) -> None:
        self.before.clear()
        self.kept = dict(self.objects)

    @rule()
    def crash(self) -> None:
        """What was not flushed is gone."""
        self.world.restart()
        assert self.found() == self.kept
        self.objects = dict(self.kept)
        self.before.clear()

    @precondition(lambda self: self.before)
    @rule(nth=st.integers(0, 12))
    def crash_in_flush(self, nth: int) -> None:
        """All of the batch or nothing; removes that go first may be alone."""
        left = [nth]

        class Crash(Exception):
            pass

        def die(step: str) -> None:
            left[0] -= 1
            if left[0] == -1:
                raise Crash

        self.world.hook = die
        with suppress(Crash):
            self.world.run(self.world.custody.flush())
        self.world.restart()
        found = self.found()
        removed = {id_: kept for id_, kept in self.kept.items() if self.objects.get(id_, (None, 0))[1] == kept[1]}
        assert found in (self.kept, self.objects, removed)
        self.objects = found
        self.promise()

    def found(self) -> Objects:
        restored = self.world.restored
        assert (restored.lost, restored.unclaimed) == ([], [])
        return {record.id: (record, os.fstat(fd).st_ino) for record, fd in restored.objects}

    @invariant()
    def count_is_right(self) -> None:
        """The daemon never believes in more room than there is."""
        self.world.manager.receive()
        assert [name for name in self.world.manager.names() if name not in self.world.custody._store] == []


class CustodyOfKeeper(CustodyModel):
    """The same with the keeper, which answers, as the manager."""

    keeper = True


TestCustodyModel = CustodyModel.TestCase
TestCustodyOfKeeper = CustodyOfKeeper.TestCase
TestCustodyModel.settings = TestCustodyOfKeeper.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
