"""Custody: both the fd and the record, or neither, through every crash and failure."""

from __future__ import annotations

import errno
import os
import resource
import socket
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from gmemd.errors import QmpError
from gmemd.persist.batch import Operation
from gmemd.persist.fdstore import opened_again
from gmemd.persist.registry import NotWritten
from gmemd.persist.waits import NotKept
from tests.persist.manager import KeeperAsManager, StandIn
from tests.persist.world import World, full_disk, ignore, rows


@pytest.fixture
def world(no_fd_is_left: None, tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path / "world")
    world.start()
    yield world
    world.close()


def inode(fd: int) -> int:
    return os.fstat(fd).st_ino


def ids(world: World) -> list[str]:
    """The objects a daemon finds that starts now."""
    return [record.id for record, _ in world.restored.objects]


class TestKept:
    def test_object_survives(self, world: World) -> None:
        """The record as it was, the same memory."""
        operation = world.add("a")
        world.flush()
        world.restart()
        assert world.restored.objects == [(operation.record, world.memory[-1])]
        assert inode(world.memory[-1]) == inode(operation.fd)
        assert world.restored.words == []
        assert not world.custody.dirty

    def test_object_without_fd(self, world: World) -> None:
        """It has a record, and nothing in the store."""
        world.custody.add(world.record("a"))
        world.flush()
        assert world.manager.names() == []
        world.restart()
        assert [(record.id, fd) for record, fd in world.restored.objects] == [("a", -1)]

    def test_removed_object_is_gone(self, world: World) -> None:
        operation = world.add("a")
        world.flush()
        world.custody.remove(operation.record)
        world.flush()
        assert world.manager.names() == []
        world.restart()
        assert ids(world) == []
        assert world.restored.words == []

    def test_update_is_kept(self, world: World) -> None:
        record = world.add("a").record
        world.flush()
        world.custody.update(record.changed(extra={"version": 2}))
        world.flush()
        world.restart()
        assert world.restored.objects[0][0] == record.changed(extra={"version": 2})

    def test_order_of_creation(self, world: World) -> None:
        for id_ in "cab":
            world.add(id_)
        world.flush()
        world.add("0")
        world.flush()
        world.restart()
        assert ids(world) == ["c", "a", "b", "0"]

    def test_any_id(self, world: World) -> None:
        """Names in the store are short, whatever the id; no name is given twice."""
        id_ = "x" * 5000 + ":é"
        for _ in range(3):
            operation = world.add(id_)
            world.flush()
            world.custody.remove(operation.record)
            world.flush()
            world.restart()
        assert len(operation.record.fd_name) < 30
        assert operation.record.fd_name.endswith("-3")


def test_sockets_of_activation_are_handed_back(world: World) -> None:
    """They take no room in the store."""
    with socket.socket(socket.AF_UNIX) as activation:
        world.add("a")
        world.flush()
        world.crash()
        world.manager.hand_down = lambda: [("gmemd.socket", os.dup(activation.fileno())),
                                           *StandIn.hand_down(world.manager)]
        world.start()
        assert [name for name, _ in world.restored.sockets] == ["gmemd.socket"]
        assert ids(world) == ["a"]
        assert world.custody.room == (1, world.manager.limit)
        for _, fd in world.restored.sockets:
            os.close(fd)


class TestBatch:
    """One transaction and one barrier carry what was noted together."""

    def steps(self, world: World) -> list[str]:
        steps: list[str] = []
        world.hook = lambda step: steps.append(step) if not step.startswith("after") else None
        world.flush()
        return steps

    def test_adds(self, world: World) -> None:
        """The barrier is on its way while the transaction is written."""
        for id_ in "abc":
            world.add(id_)
        assert self.steps(world) == [
            *["before FDSTORE=1"] * 3, "before BARRIER=1", "before transaction", "waits until readable"
        ]  # fmt: skip

    def test_adds_and_removes(self, world: World) -> None:
        old = [world.add(id_).record for id_ in "ab"]
        world.flush()
        for record in old:
            world.custody.remove(record)
        world.add("a")
        assert self.steps(world) == [
            "before FDSTORE=1", "before transaction", *["before FDSTOREREMOVE=1"] * 2, "before BARRIER=1",
            "waits until readable",
        ]  # fmt: skip
        world.restart()
        assert ids(world) == ["a"]

    def test_the_keeper_takes_many_at_once(self, no_fd_is_left: None, tmp_path: Path) -> None:
        """Its messages have many names, and the last one asks for the answer; a pipe for those lasts."""
        world = World(tmp_path / "world", manager=KeeperAsManager())
        world.start()
        records = [world.add(f"m{number}").record for number in range(100)]
        assert self.steps(world) == [
            "before FDSTORE=1", "before ANSWERS=2", "before FDSTORE=1", "before transaction", "waits until readable"
        ]  # fmt: skip
        for record in records[:70]:
            world.custody.remove(record)
        world.add("m0")
        assert self.steps(world) == [
            "before FDSTORE=1", "before transaction", *["before FDSTOREREMOVE=1"] * 2, "waits until readable"
        ]  # fmt: skip
        world.restart()
        assert sorted(ids(world)) == sorted(["m0", *(f"m{number}" for number in range(70, 100))])
        assert len(world.manager.names()) == 31
        world.close()

    def test_what_the_keeper_has_promised_to_take_need_not_be_answered(self, no_fd_is_left: None,
                                                                       tmp_path: Path) -> None:
        """A daemon that ends then finds all of it; more than was promised, and files, are answered."""
        world = World(tmp_path / "world", manager=KeeperAsManager(sure=3))
        world.start()
        ids_ = iter("abcdefghijkl")
        asked = ["before FDSTORE=1", "before transaction", "waits until readable"]
        unasked = asked[:2]
        assert [self.added(world, ids_, count)[-3:] for count in (1, 2, 1, 1, 3)] == [
            asked, unasked, unasked, asked, unasked]
        record = world.record(next(ids_))
        record.kind = "file"
        world.custody.reserve()
        world.custody.add(record, world.memory[0], again=opened_again)
        assert self.steps(world) == asked
        self.added(world, ids_, 2)
        world.restart()
        assert sorted(ids(world)) == list("abcdefghijk")
        world.close()

    def added(self, world: World, ids_: Iterator[str], count: int) -> list[str]:
        for _ in range(count):
            world.add(next(ids_))
        return self.steps(world)

    @pytest.mark.parametrize(("limit", "kept"), [(10, 6), (10, 7)])
    def test_nothing_is_promised_where_the_store_could_be_full(self, no_fd_is_left: None, tmp_path: Path, limit: int,
                                                               kept: int) -> None:
        world = World(tmp_path / "world", manager=KeeperAsManager(limit, sure=4))
        world.start()
        for number in range(kept):
            world.add(f"m{number}")
        world.flush()
        world.add("late")
        assert ("waits until readable" in self.steps(world)) == (kept + 4 > limit)
        world.close()

    def test_nothing_is_promised_where_descriptors_could_be_short(self, no_fd_is_left: None, tmp_path: Path) -> None:
        """A lower limit of open files, and a table of them that cannot grow."""
        world = World(tmp_path / "world", manager=KeeperAsManager())
        world.start()
        world.add("a")
        world.flush()
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, limits[1]))
        assert not world.manager.kept.has_room()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert world.manager.kept.has_room()
        world.close()

    def test_long_names_leave_the_keeper_too(self, no_fd_is_left: None, tmp_path: Path) -> None:
        """As many in a message as fit."""
        world = World(tmp_path / "world", manager=KeeperAsManager())
        world.start()
        for number in range(20):
            fd = os.memfd_create("foreign")
            world.notifier.store([f"{number:0250}"], [fd])
            os.close(fd)
            world.manager.receive()
        world.restart()
        for name, _ in world.restored.unclaimed:
            world.custody.give_up(name)
        assert self.steps(world) == [
            "before transaction", "before FDSTOREREMOVE=1", "before ANSWERS=2", "before FDSTOREREMOVE=1",
            "waits until readable",
        ]  # fmt: skip
        assert world.manager.names() == []
        world.close()

    def test_add_and_remove_cancel_out(self, world: World) -> None:
        """Nothing is sent and nothing is written; the id is free, the room too."""
        for _ in range(2000):
            operation = world.add("a")
            world.custody.update(operation.record.changed(extra={"version": 1}))
            world.custody.remove(operation.record)
            os.close(world.memory.pop())
        assert self.steps(world) == []

    def test_remove_add_remove_add(self, world: World) -> None:
        """Of one id in one batch the first remove and the last add count."""
        first = world.add("a").record
        world.flush()
        for _ in range(3):
            world.custody.remove(first)
            first = world.add("a").record
        world.flush()
        world.restart()
        assert [record.seq for record, _ in world.restored.objects] == [first.seq]
        assert world.manager.names() == [first.fd_name]

    def test_update_in_the_batch_of_the_add(self, world: World) -> None:
        record = world.add("a").record
        world.custody.update(record.changed(extra={"version": 2}))
        world.custody.update(record.changed(extra={"version": 3}))
        world.flush()
        world.restart()
        assert world.restored.objects[0][0].extra == {"version": 3}

    def test_queue_shorter_than_the_batch(self, world: World) -> None:
        """What does not fit the manager's queue waits until it does."""
        for number in range(100):
            world.add(str(number))
        assert "waits until writable" in self.steps(world)
        assert len(world.manager.names()) == 100

    def test_noted_while_flushing(self, world: World) -> None:
        """It belongs to the next flush."""
        world.add("a")

        def note(step: str) -> None:
            if step == "waits until readable":
                world.hook = lambda step: None
                world.add("b")

        world.hook = note
        world.run(world.custody.flush())
        assert world.custody.dirty
        world.flush()
        world.restart()
        assert ids(world) == ["a", "b"]

    def test_nothing_to_do(self, world: World) -> None:
        assert list(world.custody.flush()) == []


class TestCrashMatrix:
    """The daemon dies before and after every step of a flush."""

    @pytest.fixture(params=["room", "crowded"])
    def world(self, no_fd_is_left: None, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
        """Once with room to spare, and once so full that the removes must go first."""
        world = World(tmp_path / "world", 1024 if request.param == "room" else 21)
        world.start()
        yield world
        world.close()

    def test_every_step(self, world: World) -> None:
        """What was acknowledged is there; what was under way is there whole or not at all; no fd too many."""
        kept = {id_: world.add(id_) for id_ in ("k0", "k1", "k2", "u", "d0", "d1", "r")}
        world.flush()
        world.custody.update(kept["u"].record.changed(extra={"version": 1}))
        for id_ in ("d0", "d1", "r"):
            world.custody.remove(kept[id_].record)
        world.add("r")
        world.custody.remove(world.add("never").record)
        for number in range(14):
            world.add(f"n{number}")
        copies: list[World] = []
        steps: list[str] = []

        def copy(step: str) -> None:
            copies.append(world.copy(f"crash{len(copies)}"))
            steps.append(step)

        world.hook = copy
        world.flush()
        copy("after all")
        assert len(copies) >= 40
        seen = [self.check(copy) for copy in copies]
        assert [len(world.manager.names())] * 2 == [19, seen[-1]]
        assert seen == sorted(seen) or world.manager.limit == 21

    def check(self, world: World) -> int:
        """Start from what a crash left; how many objects there are."""
        custody = world.start()
        restored = {record.id: (record, fd) for record, fd in world.restored.objects}
        crowded = world.manager.limit == 21
        assert {"k0", "k1", "k2", "u", "r"} <= {*restored, *(["r"] if crowded else [])}
        new = {f"n{number}" for number in range(14)} & set(restored)
        assert len(new) in (0, 14)
        assert ("d0" in restored) == ("d1" in restored)
        if new:
            assert "d0" not in restored
            assert restored["u"][0].extra == {"version": 1}
        assert (world.restored.lost, world.restored.unclaimed) == ([], [])
        for record, fd in restored.values():
            assert inode(fd) == record.st_ino
        world.flush()
        assert sorted(world.manager.names()) == sorted(record.fd_name for record, _ in restored.values())
        assert [row[0] for row in rows(world.registry)] == [record.id for record, _ in world.restored.objects]
        # and now the same again, after which nothing is left to be done
        world.restart()
        assert {record.id for record, _ in world.restored.objects} == set(restored)
        assert world.restored.words == []
        assert custody is not world.custody
        # the room is known exactly
        room = world.manager.limit - len(restored) if crowded else 3
        for number in range(room):
            world.add(f"more{number}")
        if crowded:
            with pytest.raises(QmpError, match="at most 21"):
                world.custody.reserve()
        world.flush()
        assert len(world.manager.names()) == len(restored) + room
        world.close()
        return len(restored)


class TestFailures:
    """What failed is undone, in store and registry, and the next command works."""

    def fails(self, world: World, words: str) -> list[Operation]:
        """Flush once, not kept; what was undone."""
        with pytest.raises(NotKept, match=words) as caught:
            world.run(world.custody.flush())
        world.hook = lambda step: None
        return caught.value.undone

    def raise_at(self, world: World, wanted: str, exc: Exception, after: int = 0) -> None:
        """Let the step so named fail once."""
        left = [after]

        def hook(step: str) -> None:
            if step == wanted:
                left[0] -= 1
                if left[0] == -1:
                    raise exc

        world.hook = hook

    def assert_as_before(self, world: World, expected: list[str]) -> None:
        world.flush()
        assert len(world.manager.names()) == len(expected)
        world.restart()
        assert (ids(world), world.restored.words) == (expected, [])
        world.add("next")
        world.flush()
        world.restart()
        assert ids(world) == [*expected, "next"]

    @pytest.mark.parametrize(
        ("step", "exc", "words"),
        [
            ("before FDSTORE=1", OSError(errno.ENOBUFS, ""), "cannot hand over to the .*: No buffer space available"),
            ("after FDSTORE=1", OSError(errno.ETOOMANYREFS, ""), "Too many references"),
            ("before BARRIER=1", OSError(errno.EMFILE, ""), "Too many open files"),
            ("before transaction", NotWritten("full"), "registry '.*' cannot be written: full"),
        ],
    )
    def test_before_the_commit(self, world: World, step: str, exc: Exception, words: str) -> None:
        """Nothing stands."""
        old = world.add("old")
        world.flush()
        new = [world.add("a"), world.add("b")]
        self.raise_at(world, step, exc, after=1 if "FDSTORE" in step else 0)
        assert self.fails(world, words) == new[::-1]
        if "BARRIER" not in step:
            new = [world.custody.update(old.record), world.custody.remove(old.record), world.add("c")]
            self.raise_at(world, step, exc)
            assert self.fails(world, words) == new[::-1]
        self.assert_as_before(world, ["old"])

    def test_error_hides_a_commit(self, world: World) -> None:
        """SQLite reports an error and has written all the same: adds are taken back, removes stand."""
        old = world.add("old")
        world.flush()
        world.custody.remove(old.record)
        new = world.add("a")
        self.raise_at(world, "after transaction", NotWritten("disk I/O error"))
        assert self.fails(world, "disk I/O error") == [new]
        self.assert_as_before(world, [])

    def test_barrier_times_out(self, world: World) -> None:
        """Adds are taken back, removes and updates stand; the removals are finished with the next flush."""
        old = [world.add("old").record, world.add("other").record]
        world.flush()
        world.custody.remove(old[0])
        world.custody.update(old[1].changed(extra={"version": 5}))
        new = [world.add("a"), world.add("b")]
        with pytest.raises(NotKept, match="did not answer within 30 s") as caught:
            world.run(world.custody.flush(), lambda wait: False)
        assert caught.value.undone == new[::-1]
        assert world.custody.trouble == "the service manager did not answer within 30 s"
        self.assert_as_before(world, ["other"])
        assert world.custody.trouble == ""
        assert world.restored.objects[0][0].extra == {"version": 5}

    def test_driver_cannot_wait(self, world: World) -> None:
        """An error of the event loop is an error of the flush."""
        operation = world.add("a")
        flush = world.custody.flush()
        next(flush)
        with pytest.raises(NotKept, match="No space left on device") as caught:
            flush.throw(OSError(errno.ENOSPC, ""))
        assert caught.value.undone == [operation]
        self.assert_as_before(world, [])

    def test_removes_stand_without_an_answer(self, world: World) -> None:
        """A removal that is written is acknowledged; it is asked for again until it is confirmed."""
        record = world.add("a").record
        world.flush()
        world.custody.remove(record)
        self.raise_at(world, "before FDSTOREREMOVE=1", OSError(errno.ENOBUFS, ""))
        world.run(world.custody.flush())
        assert "No buffer space" in world.custody.trouble
        assert len(world.manager.names()) == 1
        self.assert_as_before(world, [])

    def test_later_operations_are_undone_too(self, world: World) -> None:
        """What was noted during the failing flush builds on it."""
        old = world.add("old").record
        world.flush()
        first = world.add("a")
        flush = world.custody.flush()
        next(flush)
        later = [world.custody.remove(first.record), world.add("a"), world.custody.remove(old)]
        with pytest.raises(NotKept) as caught:
            flush.send(False)
        assert caught.value.undone == [*later[::-1], first]
        self.assert_as_before(world, ["old"])

    def test_undo_that_fails_is_owed(self, world: World) -> None:
        """The answer is an error; a restart may find the object whole, the next flush takes it away."""
        operation = world.add("a")
        world.hook = lambda step: None
        flush = world.custody.flush()
        next(flush)
        world.hook = full_disk
        with pytest.raises(NotKept, match="did not answer") as caught:
            flush.send(False)
        assert caught.value.undone == [operation]
        copy = world.copy("crash")
        copy.start()
        assert ids(copy) == ["a"]
        copy.close()
        world.hook = lambda step: None
        self.assert_as_before(world, [])

    def test_room_is_as_before(self, no_fd_is_left: None, tmp_path: Path) -> None:
        """A failure neither loses nor makes room."""
        world = World(tmp_path / "small", 4)
        world.start()
        for _ in range(5):
            for id_ in "abc":
                world.add(id_)
            self.raise_at(world, "before FDSTORE=1", OSError(errno.ENOBUFS, ""), after=2)
            self.fails(world, "No buffer space")
            world.flush()
        for id_ in "abcd":
            world.add(id_)
        with pytest.raises(QmpError, match="FileDescriptorStoreMax="):
            world.custody.reserve()
        world.flush()
        assert len(world.manager.names()) == 4
        world.close()

    def test_reservation_given_back(self, no_fd_is_left: None, tmp_path: Path) -> None:
        world = World(tmp_path / "small", 1)
        world.start()
        for _ in range(3):
            world.custody.reserve()
            world.custody.release()
        world.custody.remove(world.add("a").record)
        world.add("a")
        world.flush()
        world.close()

    def test_read_only(self, world: World) -> None:
        """Adds, removes and updates are refused with the reason; memory is handed out; it ends by itself."""
        operation = world.add("a")
        world.flush()
        world.crash()
        path = world.path
        world.path = str(world.directory / "none" / "registry")
        world.start()
        assert "cannot be written: unable to open" in world.restored.words[0]
        assert [name for name, _ in world.restored.unclaimed] == [operation.record.fd_name]
        assert world.custody.read_only
        for change in (
            world.custody.reserve,
            lambda: world.custody.add(operation.record),  # of an fd that the manager has
            lambda: world.custody.remove(operation.record),
            lambda: world.custody.update(operation.record),
        ):
            with pytest.raises(QmpError, match="cannot be written: unable to open"):
                change()
        world.path = path
        self.assert_as_before(world, ["a"])


class TestDamage:
    """Nothing is dropped on the word of a damaged registry."""

    def damage(self, world: World, statement: str) -> None:
        world.crash()
        with sqlite3.connect(world.path) as db:
            db.execute(statement)
        db.close()
        world.start()

    def test_registry_lost(self, world: World) -> None:
        """Its fds are unclaimed, and stay so; new objects live next to them."""
        old = world.add("a").record
        world.flush()
        world.crash()
        os.unlink(world.path)
        for _ in range(2):
            world.start()
            assert [name for name, _ in world.restored.unclaimed] == [old.fd_name]
            assert "belongs to no object: it is kept" in world.restored.words[0]
            world.crash()
        world.start()
        new = world.add("a").record
        world.flush()
        assert set(world.manager.names()) == {old.fd_name, new.fd_name}
        world.restart()
        assert ids(world) == ["a"]
        world.custody.discard(old.fd_name)
        world.flush()
        world.restart()
        assert (ids(world), world.restored.unclaimed) == (["a"], [])

    def test_registry_is_no_database(self, world: World) -> None:
        world.add("a")
        world.flush()
        world.crash()
        Path(world.path).write_text("lorem ipsum " * 500)
        world.start()
        assert len(world.restored.unclaimed) == 1
        assert "is damaged" in world.restored.words[0]

    def test_sound_rows_are_recovered(self, world: World) -> None:
        """They are objects again, in the new registry; the other's memory is kept."""
        for id_ in "abc":
            world.add(id_)
        world.flush()
        self.damage(world, "UPDATE objects SET size = 'x' WHERE id = 'b'")
        assert ids(world) == ["a", "c"]
        assert len(world.restored.unclaimed) == 1
        world.restart()
        assert ids(world) == ["a", "c"]
        assert len(world.restored.unclaimed) == 1
        world.add("b")
        world.flush()
        world.restart()
        assert ids(world) == ["a", "c", "b"]

    def test_unacknowledged_is_kept_when_the_registry_is_damaged(self, world: World) -> None:
        world.add("a")
        flush = world.custody.flush()
        next(flush)
        flush.close()
        self.damage(world, "UPDATE state SET last_seq = 0")
        assert ids(world) == ["a"]
        world.crash()
        with sqlite3.connect(world.path) as db:
            db.execute("UPDATE state SET removing = 'x'")
            db.execute("DELETE FROM objects")
        db.close()
        world.start()
        assert len(world.restored.unclaimed) == 1
        assert world.restored.dropped == []

    def test_lost_memory(self, world: World) -> None:
        """A record without its fd is reported and kept until it is removed; nothing is recreated."""
        lost = world.add("a").record
        world.flush()
        world.manager._drop([lost.fd_name])
        for _ in range(2):
            world.restart()
            assert (ids(world), world.restored.lost) == ([], [lost])
            assert world.restored.words == ["object 'a' is lost: its fd did not come back"]
        world.custody.remove(lost)
        world.flush()
        world.restart()
        assert (world.restored.lost, world.restored.words) == ([], [])


# -- an open file is kept once ---------------------------------------------------------------------------------

def _shared(world: World, id_: str, fd: int) -> Operation:
    assert world.custody is not None
    world.custody.reserve()
    return world.custody.add(world.record(id_), fd, again=opened_again)


def test_one_open_file_of_two_objects(world: World) -> None:
    """What is kept under another name already is opened once more: deleting the one leaves the other."""
    first = world.add("a")
    world.flush()
    _shared(world, "b", first.fd)
    world.flush()
    assert len(world.manager.names()) == 2
    assert world.custody is not None
    world.custody.remove(first.record)
    world.flush()
    world.restart()
    assert [record.id for record, _ in world.restored.objects] == ["b"]
    assert world.restored.lost == []


def test_two_objects_of_one_open_file_in_one_flush(world: World) -> None:
    """The same before anything is sent."""
    fd = world.add("a").fd
    _shared(world, "b", fd)
    world.flush()
    world.restart()
    assert sorted(record.id for record, _ in world.restored.objects) == ["a", "b"]


def test_kept_again_in_the_flush_that_gives_it_up(world: World) -> None:
    """Off and on in one flush: it is there, under one name."""
    first = world.add("a")
    world.flush()
    assert world.custody is not None
    world.custody.remove(first.record)
    _shared(world, "a", first.fd)
    world.flush()
    assert len(world.manager.names()) == 1
    world.restart()
    assert [record.id for record, _ in world.restored.objects] == ["a"]
    assert world.restored.lost == []


def test_what_cannot_be_opened_again(world: World) -> None:
    """As a guest_memfd: refused while it is kept under another name; kept once that one has left before."""
    assert world.custody is not None
    fd = os.eventfd(0)
    world.memory.append(fd)
    world.custody.reserve()
    first = world.custody.add(world.record("a"), fd)
    world.flush()
    with pytest.raises(QmpError, match="keeps an open file once"):
        _shared(world, "b", fd)
    world.custody.release()
    world.custody.remove(first.record)
    second = _shared(world, "b", fd)
    world.flush()
    assert world.manager.names() == [second.record.fd_name]


def test_giving_up_what_belongs_to_no_object(world: World) -> None:
    """It has left the store for good when the flush has ended; one that fails leaves it there."""
    world.add("a")
    world.flush()
    world.crash()
    os.unlink(world.path)
    custody = world.start()
    [(name, _)] = world.restored.unclaimed
    world.hook = full_disk
    operation = custody.give_up(name)
    with pytest.raises(NotKept) as caught:
        world.flush()
    assert caught.value.undone == [operation]
    assert world.manager.names() == [name]
    world.hook = ignore
    custody.give_up(name)
    world.flush()
    assert world.manager.names() == []
    world.restart()
    assert world.restored.unclaimed == []
