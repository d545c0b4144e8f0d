"""The registry's copy in the store: over a kexec nothing is lost, and nothing is dropped on the word of an old copy."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from gmemd.errors import QmpError
from gmemd.persist.carried import is_copy, newest, parsed, put_back, read, sealed, written
from gmemd.persist.note import leave, take
from gmemd.persist.record import State
from gmemd.persist.waits import NotKept
from tests.persist.manager import StandIn
from tests.persist.world import World, ignore

STATE = State(1, "abcd0123", 7, 2, 3, ())
BOOT = f"{1:032x}"


@pytest.fixture
def world(no_fd_is_left: None, tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path / "world", carries=True)
    world.start()
    yield world
    world.close()


def ids(world: World) -> list[str]:
    return [record.id for record, _ in world.restored.objects]


def lost(world: World) -> dict[str, str]:
    return {record.id: record.missing for record in world.restored.lost}


def copies(world: World) -> list[str]:
    return [name for name in world.manager.names() if is_copy(name)]


def add(world: World, *names: str) -> None:
    for name in names:
        world.add(name)
    world.flush()


class TestKexec:
    @pytest.mark.parametrize("kept", [False, True])
    def test_everything_is_back_twice(self, world: World, kept: bool) -> None:
        """Under its ids, with its bytes; the registry's file may be there or not."""
        add(world, "b", "a")
        for fd in world.memory:
            os.pwrite(fd, b"%d" % fd, 0)
        contents = [os.pread(fd, 9, 0) for fd in world.memory]
        for _ in range(2):
            world.carry()
            world.kexec(kept=kept)
            assert ids(world) == ["b", "a"]
            assert [os.pread(fd, 9, 0) for _, fd in world.restored.objects] == contents
            assert bool(world.put_back) is not kept
            assert world.restored.words == []
            for record, fd in world.restored.objects:
                assert (record.st_ino, record.boot) == (os.fstat(fd).st_ino, f"{world.boot:032x}")
            world.custody.rewrite([record for record, _ in world.restored.objects])

    def test_afterwards_a_file_is_known_by_its_inode_again(self, world: World) -> None:
        add(world, "a")
        world.carry()
        world.kexec()
        world.custody.rewrite([record for record, _ in world.restored.objects])
        name = world.restored.objects[0][0].fd_name
        world.manager._drop([name])
        other = os.memfd_create("other")
        os.truncate(other, 4096)
        world.manager.store.append((name, other))
        world.restart()
        assert "is another file" in lost(world)["a"]

    def test_what_is_not_carried_is_lost_and_says_why(self, world: World) -> None:
        """And its id stays taken."""
        huge = world.add("huge").record
        huge.kind = "hugetlb-memfd"
        add(world, "a", "gone")
        world.carry()
        world.manager._drop([huge.fd_name, world.manager.names()[1]])  # newest first, the copy before it
        world.kexec()
        assert ids(world) == ["a"]
        assert lost(world) == {
            "huge": "the machine was started anew, and no kernel carries a hugetlb-memfd across kexec",
            "gone": "the machine was started anew, and its fd did not come back"}

    @pytest.mark.parametrize(("size", "seals", "words"), [
        (8192, 0, "has 8192 bytes instead of 4096"), (4096, 0, "has lost seals: 0x1 are expected")])
    def test_another_file_under_its_name(self, world: World, size: int, seals: int, words: str) -> None:
        """The memfd of a test is sealed against further seals."""
        add(world, "a")
        world.carry()
        name, fd = world.manager.store.pop()
        os.close(fd)
        other = os.memfd_create("", os.MFD_ALLOW_SEALING)
        os.truncate(other, size)
        world.manager.store.append((name, other))
        world.kexec()
        assert words in lost(world)["a"]
        assert [name for name, _ in world.restored.unclaimed] == [name]

    def test_without_live_update_nothing_comes_back(self, world: World) -> None:
        """Whoever keeps the file elsewhere than in /run is told what is lost."""
        add(world, "a")
        world.carry()
        world.manager.close()
        world.manager = StandIn(world.directory / "..", 1024)
        world.kexec(kept=True)
        assert lost(world) == {"a": "the machine was started anew, and its fd did not come back"}


class TestOldCopy:
    def test_what_it_does_not_know_is_unclaimed(self, world: World) -> None:
        """However often the daemon starts: it is dropped only if somebody says so."""
        add(world, "a")
        world.carry()
        add(world, "late")
        world.kexec()
        for _ in range(3):
            assert ids(world) == ["a"]
            assert [name[-2:] for name, _ in world.restored.unclaimed] == ["-2"]
            operation = world.add("x")
            world.flush()
            world.custody.remove(operation.record)
            world.flush()
            world.restart()

    def test_what_was_deleted_since_is_lost(self, world: World) -> None:
        operation = world.add("a")
        world.flush()
        world.carry()
        world.custody.remove(operation.record)
        world.flush()
        world.kexec()
        assert list(lost(world)) == ["a"]


class TestWhichIsUsed:
    def test_the_file_where_it_is_whole(self, world: World) -> None:
        add(world, "a")
        world.carry()
        add(world, "b")
        world.restart()
        assert (ids(world), world.put_back) == (["a", "b"], "")

    def test_the_copy_where_the_file_is_older(self, world: World) -> None:
        """Somebody has put a backup in its place."""
        add(world, "a")
        old = Path(world.path).read_bytes()
        add(world, "b")
        world.carry()
        world.crash()
        Path(world.path).write_bytes(old)
        world.start()
        assert ids(world) == ["a", "b"]
        assert "is older than a copy" in world.put_back
        assert Path(f"{world.path}.damaged-1").read_bytes() == old

    def test_both_where_the_file_is_damaged(self, world: World) -> None:
        """What can be read of it, and of the rest what the copy knows."""
        add(world, "a", "b")
        world.carry()
        add(world, "c")
        world.crash()
        image = bytearray(Path(world.path).read_bytes())
        image[image.index(b'{"id":"a"}') + 7] ^= 1
        Path(world.path).write_bytes(image)
        world.start()
        assert ids(world) == ["a", "b", "c"]
        assert "is damaged" in world.restored.words[0]

    def test_the_copy_instead_of_a_file_that_never_held_anything(self, world: World) -> None:
        """A gmemd that knows no copies was started in between."""
        add(world, "a")
        world.carry()
        world.crash()
        os.unlink(world.path)
        World.start(other := World(world.directory / "other"))
        other.close()
        os.rename(other.path, world.path)
        world.start()
        assert ids(world) == ["a"]

    def test_the_file_of_another_registry_that_holds_something(self, world: World) -> None:
        add(world, "a")
        world.carry()
        other = World(world.directory / "other")
        other.start()
        other.add("b")
        other.flush()
        other.close()
        world.crash()
        os.rename(other.path, world.path)
        world.start()
        assert (ids(world), list(lost(world)), len(world.restored.unclaimed)) == ([], ["b"], 1)

    def test_an_older_copy_where_the_newest_is_not_whole(self, world: World) -> None:
        add(world, "a")
        world.carry()
        world.crash()
        broken = os.memfd_create("broken")
        os.write(broken, os.pread(world.manager.store[0][1], 1 << 20, 0)[:-1])
        world.manager.store.insert(0, ("registry-9", broken))
        os.unlink(world.path)
        world.start()
        assert ids(world) == ["a"]
        world.carry()
        assert copies(world) == ["registry-10"]

    def test_a_place_that_cannot_be_written(self, tmp_path: Path, no_fd_is_left: None) -> None:
        copy = parsed(written(STATE, b"", BOOT, {}))
        assert "cannot be restored from a copy" in put_back(copy, str(tmp_path / "none/registry"))


class TestInTheStore:
    def test_it_is_not_written_with_a_change(self, world: World) -> None:
        """Only when asked, and only if something has changed."""
        steps: list[str] = []
        add(world, "a")
        assert copies(world) == []
        world.carry()
        world.hook = steps.append
        world.carry()
        assert (copies(world), steps, world.custody.copies.due) == (["registry-1"], [], 0)
        add(world, "b")
        before = world.custody.copies.due
        world.flush()
        assert before == world.custody.copies.due > 0
        world.carry()
        assert copies(world) == ["registry-2"]

    def test_there_is_always_room_for_it(self, tmp_path: Path, no_fd_is_left: None) -> None:
        world = World(tmp_path / "small", 4, carries=True)
        world.start()
        record = world.add("a").record
        add(world, "b")
        with pytest.raises(QmpError, match="keeps at most 4"):
            world.custody.reserve()
        for _ in range(3):
            world.carry()
            world.custody.update(record)
            world.flush()
            assert len(world.manager.store) == 3
            with pytest.raises(QmpError, match="keeps at most 4"):
                world.custody.reserve()
        world.close()

    def test_a_store_that_was_full_before(self, tmp_path: Path, no_fd_is_left: None) -> None:
        """Objects are not given up for it."""
        world = World(tmp_path / "full", 2)
        world.start()
        add(world, "a", "b")
        world.carries = True
        world.restart()
        world.carry()
        assert (copies(world), world.custody.copies.stored, len(ids(world))) == ([], False, 2)
        world.close()

    def test_where_no_copy_is_wanted_one_is_dropped(self, world: World) -> None:
        world.carry()
        world.carries = False
        world.restart()
        world.flush()
        assert copies(world) == []

    def test_it_is_given_again(self, world: World) -> None:
        add(world, "a")
        world.carry()
        entries = world.manager.hand_down()
        world.manager._drop(world.manager.names())
        world.custody.give_again(lambda: entries[1:], wholly=True)
        world.flush()
        world.manager.receive()
        assert sorted(world.manager.names()) == sorted(name for name, _ in entries)
        for _, fd in entries:
            os.close(fd)

    def test_a_manager_that_refuses_it(self, world: World) -> None:
        """No object suffers, and the next try succeeds."""
        add(world, "a")

        def refuse(step: str) -> None:
            if step == "before FDSTORE=1":
                raise OSError(errno.EPIPE, "gone")

        world.hook = refuse
        world.custody.copies.ask(lambda: world.manager.store)
        with suppress(NotKept):
            world.flush()
        assert world.custody.trouble
        world.hook = ignore
        world.carry()
        assert copies(world) == ["registry-2"]
        world.restart()
        assert ids(world) == ["a"]


def count(left: list[int]) -> None:
    """A step of a run that ends when none is left."""
    left[0] -= 1
    if left[0] < 0:
        raise KeyboardInterrupt


def test_a_crash_at_any_step_leaves_a_whole_copy(tmp_path: Path, no_fd_is_left: None) -> None:
    """Then the machine goes on without the file."""
    for number in range(40):
        world = World(tmp_path / str(number), carries=True)
        world.start()
        add(world, "a")
        world.carry()
        add(world, "b")
        left = [number]
        world.hook = lambda step, left=left: count(left)
        try:
            world.carry()
            ended = True
        except KeyboardInterrupt:
            ended = False
        world.kexec()
        found = [*ids(world), *(name for name, _ in world.restored.unclaimed)]
        assert ids(world)[0] == "a"
        assert len(found) == 2
        world.close()
        if ended:
            assert number > 3
            return
    raise AssertionError("it never ends")


def test_a_copy_that_is_not_whole_is_not_read(no_fd_is_left: None) -> None:
    """Each byte of it counts, its length, and that nobody can change it."""
    data = written(STATE, b"image" * 10, BOOT, {"m-abcd0123-1": 3})
    copy = parsed(data)
    assert copy is not None
    assert (copy.boot, copy.generation, copy.age) == (BOOT, "abcd0123", (3, 7, 2))
    assert (copy.seals, copy.image) == ({"m-abcd0123-1": 3}, b"image" * 10)
    for at in range(data.index(b"\n") + 1, len(data)):
        assert parsed(data[:at] + bytes([data[at] ^ 4]) + data[at + 1:]) is None
    for damaged in (data[:-1], data + b"x", b"", b"x" + data[1:], data[:40], data.replace(b" ", b"", 1)):
        assert parsed(damaged) is None
    whole, open_to_all = sealed(data), os.memfd_create("copy", os.MFD_ALLOW_SEALING)
    os.write(open_to_all, data)
    assert read(whole) == copy
    assert newest([("registry-1", open_to_all), ("registry-0", whole), ("x", whole)]) is None
    os.close(whole)
    os.close(open_to_all)


class TestNote:
    """What is on the disk after a kexec."""

    def boots(self, world: World, loaded: str) -> str:
        """The daemon ends, and the next boot has nothing but the disk; what it finds there."""
        shows = world.directory / "kexec_loaded"
        shows.write_text(loaded)
        assert leave(world.custody, str(world.directory), str(shows)) == ""
        world.crash()
        world.manager._drop(world.manager.names())
        os.unlink(world.path)
        world.boot += 1
        put_back(take(str(world.directory), f"{world.boot:032x}"), world.path)
        world.start()
        return " ".join(lost(world))

    def test_it_says_what_is_lost(self, world: World) -> None:
        add(world, "a", "b")
        assert self.boots(world, "1\n") == "a b"
        assert set(lost(world).values()) == {"the machine was started anew, and its fd did not come back"}
        assert take(str(world.directory), "") is None

    def test_another_reboot_leaves_nothing(self, world: World) -> None:
        add(world, "a")
        assert self.boots(world, "0\n") == ""

    def test_it_is_not_for_the_same_boot(self, world: World) -> None:
        shows = world.directory / "kexec_loaded"
        shows.write_text("1\n")
        leave(world.custody, str(world.directory), str(shows))
        assert (world.directory / "before-kexec").stat().st_mode & 0o777 == 0o600
        assert take(str(world.directory), BOOT) is None
        assert not (world.directory / "before-kexec").exists()

    def test_a_place_that_cannot_be_written(self, world: World) -> None:
        shows = world.directory / "kexec_loaded"
        shows.write_text("1\n")
        assert "cannot be noted" in leave(world.custody, "/nowhere", str(shows))
        assert leave(world.custody, "/nowhere", "/nowhere/loaded") == ""
