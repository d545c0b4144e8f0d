"""The service manager's protocol as spoken by the daemon, against the stand-in and against our keeper."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from gmemd.errors import QmpError
from gmemd.keeper.kept import KeptFds
from gmemd.persist import notify
from gmemd.persist.keeping import UNLIMITED
from gmemd.persist.notify import (
    Notifier,
    listen_fds,
    raised_limit,
    runner_limit,
    store_limit,
    watchdog_seconds,
)
from tests.persist.conftest import Manager
from tests.persist.manager import KeeperAsManager


@pytest.fixture
def memory(no_fd_is_left: None) -> Iterator[list[int]]:
    """Four memfds."""
    fds = [os.memfd_create(str(number)) for number in range(4)]
    yield fds
    for fd in fds:
        os.close(fd)


def fill(notifier: Notifier) -> None:
    """Send until the manager's queue is full."""
    with contextlib.suppress(BlockingIOError):
        for _ in range(100_000):
            notifier.status("waiting")


def passed(reader: int) -> bool:
    """Is the barrier behind us? Closes it."""
    events = select.select([reader], [], [], 0)[0]
    os.close(reader)
    return bool(events)


class TestAnswers:
    """What the keeper understands besides."""

    @pytest.fixture
    def keeper(self, no_fd_is_left: None) -> Iterator[KeeperAsManager]:
        keeper = KeeperAsManager(3)
        yield keeper
        keeper.close()

    @pytest.fixture
    def notifier(self, keeper: KeeperAsManager) -> Iterator[Notifier]:
        notifier = Notifier(keeper.address, several=64)
        yield notifier
        notifier.close()

    def test_several_names(self, keeper: KeeperAsManager, notifier: Notifier, memory: list[int]) -> None:
        """A message of them may be the barrier."""
        assert notifier.store(["a"], memory[:1]) == -1
        barrier = notifier.store(["b", "c"], memory[1:3], ask=True)
        assert not select.select([barrier], [], [], 0)[0]
        keeper.receive()
        notifier.passed(barrier)
        assert keeper.names() == ["c", "b", "a"]
        barrier = notifier.remove(["a", "c"], ask=True)
        keeper.receive()
        notifier.passed(barrier)
        assert keeper.names() == ["b"]

    def test_what_is_not_held_is_answered_so(self, keeper: KeeperAsManager, notifier: Notifier,
                                             memory: list[int]) -> None:
        """Once; the pipe lasts."""
        barriers = set()
        for names in ("abcd", "e"):
            barrier = notifier.store(names, memory[:len(names)], ask=True)
            keeper.receive()
            with pytest.raises(OSError, match="Too many open files"):
                notifier.passed(barrier)
            barriers.add(barrier)
        barriers.add(notifier.barrier())
        keeper.receive()
        [barrier] = barriers
        notifier.passed(barrier)
        assert keeper.names() == ["c", "b", "a"]

    def test_names_and_descriptors_that_do_not_match(self, keeper: KeeperAsManager, notifier: Notifier,
                                                     memory: list[int]) -> None:
        barrier = notifier.store("abc", memory[:2], ask=True)
        keeper.receive()
        with pytest.raises(OSError, match="Too many open files"):
            notifier.passed(barrier)
        assert keeper.names() == []

    def test_a_late_answer_is_not_the_next_ones(self, keeper: KeeperAsManager, notifier: Notifier,
                                                memory: list[int]) -> None:
        """Who no longer waits for an answer gets the next ones elsewhere."""
        notifier.abandon(notifier.barrier())
        reader = notifier.barrier()
        keeper.receive()
        notifier.passed(reader)
        assert not select.select([reader], [], [], 0)[0]

    def test_an_answer_needs_its_pipe(self, keeper: KeeperAsManager, notifier: Notifier) -> None:
        """A keeper that has lost it: an error at once, and a new pipe with the next question."""
        reader = notifier.barrier()
        keeper.receive()
        notifier.passed(reader)
        keeper.kept.forget_answers()
        notifier.notify("ANSWER=1")
        keeper.receive()
        with pytest.raises(OSError, match="Too many open files"):
            notifier.passed(reader)
        reader = notifier.barrier()
        keeper.receive()
        notifier.passed(reader)


class TestPromises:
    """The keeper says that it will take so much more, to a daemon that understands it."""

    def answered(self, keeper: KeeperAsManager, sure: int, memory: list[int]) -> list[int]:
        """What is promised after each of some messages."""
        notifier = Notifier(keeper.address, several=64, sure=sure)
        promised = [notifier.promised]
        for step in (notifier.barrier, partial(notifier.store, "a", memory[:1]),
                     partial(notifier.store, "b", memory[1:2], ask=True), partial(notifier.store, "c", memory[2:3]),
                     partial(notifier.remove, "b", ask=True)):
            barrier = step()
            keeper.receive()
            if barrier >= 0:
                notifier.passed(barrier)
            promised.append(notifier.promised)
        notifier.abandon(notifier.barrier())
        promised.append(notifier.promised)
        notifier.close()
        return promised

    @pytest.mark.parametrize(("sure", "promised"), [(2, [0, 2, 1, 2, 1, 2, 0]), (0, [0, 0, -1, 0, -1, 0, 0])])
    def test_promised(self, no_fd_is_left: None, memory: list[int], sure: int, promised: list[int]) -> None:
        keeper = KeeperAsManager(4, sure=2)
        assert self.answered(keeper, sure, memory) == promised
        keeper.close()

    def test_nothing_is_promised_when_something_is_not_held(self, no_fd_is_left: None, memory: list[int]) -> None:
        keeper = KeeperAsManager(4, sure=2)
        notifier = Notifier(keeper.address, several=64, sure=2)
        barrier = notifier.store("ab", memory[:1], ask=True)
        keeper.receive()
        with pytest.raises(OSError, match="Too many open files"):
            notifier.passed(barrier)
        assert notifier.promised == 0
        notifier.close()
        keeper.close()


def test_a_message_for_which_there_is_no_memory_comes_again(no_fd_is_left: None, memory: list[int],
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """None of its descriptors is lost, whatever the keeper had done with it."""
    keeper, really = KeeperAsManager(8), KeptFds.take
    notifier = Notifier(keeper.address, several=64)
    notifier.store("abcd", memory)
    for fails in (2, 0, 3):  # of the calls that follow, the one that fails
        calls = count()

        def take(kept: KeptFds, name: str, fd: int, calls: Iterator[int] = calls, fails: int = fails) -> bool:
            if next(calls) == fails:
                raise MemoryError
            return really(kept, name, fd)

        monkeypatch.setattr(KeptFds, "take", take)
        with contextlib.suppress(MemoryError):
            keeper.receive()
    monkeypatch.undo()
    keeper.receive()
    assert keeper.names() == ["d", "c", "b", "a"]
    assert not keeper.kept.lost
    notifier.close()
    keeper.close()


class TestManagers:
    """What holds for every manager."""

    def test_barrier_passes_when_all_before_it_was_looked_at(self, manager: Manager, notifier: Notifier) -> None:
        first, second = notifier.barrier(), notifier.barrier()
        assert select.select([first, second], [], [], 0) == ([], [], [])
        manager.receive()
        assert passed(first)
        assert passed(second)

    def test_newest_first(self, manager: Manager, notifier: Notifier, memory: list[int]) -> None:
        notifier.store(["a"], [memory[0]])
        notifier.store(["b"], [memory[1]])
        manager.receive()
        assert manager.names() == ["b", "a"]

    def test_a_full_store_drops_without_a_word(
        self, manager: Manager, notifier: Notifier, memory: list[int]
    ) -> None:
        for fd in memory:
            notifier.store([f"m{fd}"], [fd])
        barrier = notifier.barrier()
        manager.receive()
        assert passed(barrier)
        assert len(manager.names()) == 3

    def test_one_open_file_keeps_its_first_name(
        self, manager: Manager, notifier: Notifier, memory: list[int]
    ) -> None:
        notifier.store(["first"], [memory[0]])
        notifier.store(["second"], [memory[0]])
        again = os.open(f"/proc/self/fd/{memory[0]}", os.O_RDWR)
        notifier.store(["third"], [again])
        os.close(again)
        manager.receive()
        assert manager.names() == ["third", "first"]

    def test_removal_takes_all_of_a_name(
        self, manager: Manager, notifier: Notifier, memory: list[int]
    ) -> None:
        for name, fd in zip("aab", memory, strict=False):
            notifier.store([name], [fd])
        notifier.remove(["a"])
        notifier.remove(["unknown"])
        manager.receive()
        assert manager.names() == ["b"]
        notifier.store(["a"], [memory[0]])
        manager.receive()
        assert manager.names() == ["a", "b"]

    @pytest.mark.parametrize(
        ("name", "stored"),
        [("a b", "a b"), ("a:b", "stored"), ("é", "stored"), ("a\tb", "stored"), ("", ""), ("x" * 255, "x" * 255),
         ("x" * 256, "stored")],
    )  # fmt: skip
    def test_names(
        self, manager: Manager, notifier: Notifier, memory: list[int], name: str, stored: str
    ) -> None:
        """What is not a name becomes "stored"."""
        notifier.store([name], [memory[0]])
        manager.receive()
        assert manager.names() == [stored]

    def test_of_two_names_the_first_counts(
        self, manager: Manager, notifier: Notifier, memory: list[int]
    ) -> None:
        notifier.notify("FDSTORE=1\nFDNAME=a\nFDNAME=b", [memory[0]])
        notifier.notify("FDSTORE=1", [memory[1]])
        manager.receive()
        assert manager.names() == ["stored", "a"]

    def test_many_fds_in_a_message(self, manager: Manager, notifier: Notifier, memory: list[int]) -> None:
        """The first that fit are kept."""
        notifier.notify("FDSTORE=1\nFDNAME=all", memory)
        manager.receive()
        assert manager.names() == ["all"] * 3

    def test_long_message_is_dropped_with_its_fds(self, manager: Manager, memory: list[int]) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as raw:
            address = manager.address
            raw.connect("\0" + address[1:] if address[0] == "@" else address)
            for size, names in ((4097, []), (4096, ["a"])):
                socket.send_fds(raw, [b"FDSTORE=1\nFDNAME=a\nX=".ljust(size, b"y")], memory[:1])
                manager.receive()
                assert manager.names() == names

    @pytest.mark.parametrize(
        "rubbish", [b"", b"\n", b"=", b"FDSTORE", b"FDSTORE=1", b"\xff\xfe=\0", b"MAINPID=1", b"MAINPID=x",
                    b"WATCHDOG_USEC=99999999999999999999", b"READY=2", b"BARRIER=1", b"FDSTOREREMOVE=1\nFDNAME=\0"]
    )  # fmt: skip
    def test_rubbish_does_no_harm(
        self, manager: Manager, notifier: Notifier, memory: list[int], rubbish: bytes
    ) -> None:
        notifier.notify(rubbish.decode("latin-1"))
        notifier.store(["good"], [memory[0]])
        manager.receive()
        assert manager.names() == ["good"]

    def test_full_queue_says_wait(self, manager: Manager, notifier: Notifier) -> None:
        """BlockingIOError; when the manager has read, the socket is writable and the message goes."""

        fill(notifier)
        assert select.select([], [notifier], [], 0)[1] == []
        with pytest.raises(BlockingIOError):
            notifier.barrier()
        manager.receive()
        assert select.select([], [notifier], [], 0)[1] == [notifier]
        notifier.status("now it goes")


def test_words_of_the_helpers(tmp_path: Path) -> None:
    """Each helper sends exactly the documented assignment."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(tmp_path / "n"))
        notifier = Notifier(str(tmp_path / "n"))
        notifier.ready("3 objects,\n 5 GiB")
        notifier.ready()
        notifier.status("x" * 5000)
        notifier.watchdog()
        notifier.stopping()
        got = [end.recv(8192).decode() for _ in range(5)]
        notifier.close()
    assert got == [
        "READY=1\nSTATUS=3 objects, 5 GiB",
        "READY=1",
        "STATUS=" + "x" * 1024,
        "WATCHDOG=1",
        "STOPPING=1",
    ]


def test_a_full_queue_does_not_starve_the_watchdog(tmp_path: Path) -> None:
    """A feed that found no room goes ahead of the next message, which in a batch always comes first."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as end:
        end.bind(str(tmp_path / "n"))
        notifier = Notifier(str(tmp_path / "n"))
        fill(notifier)
        notifier.watchdog()
        with pytest.raises(BlockingIOError):
            notifier.remove(["a"])
        assert end.recv(100) == b"STATUS=waiting"
        with pytest.raises(BlockingIOError):
            notifier.remove(["a"])
        while (got := end.recv(100)) == b"STATUS=waiting":
            pass
        assert got == b"WATCHDOG=1"
        notifier.remove(["a"])
        assert end.recv(100) == b"FDSTOREREMOVE=1\nFDNAME=a"
        notifier.close()


def test_an_abstract_name_is_not_looked_up_again() -> None:
    """Whoever takes the name of a manager that is gone is not sent the memory."""
    first = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    first.bind("")
    name = first.getsockname()
    notifier = Notifier("@" + name[1:].decode())
    first.close()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as other:
        other.bind(name)
        with pytest.raises(ConnectionRefusedError):
            notifier.store(["secret"], [0])
        with pytest.raises(BlockingIOError):
            other.recv(100)
    notifier.close()


def test_a_new_socket_of_the_manager_is_found(tmp_path: Path) -> None:
    """A manager that was restarted is spoken to; one that is gone is an OSError."""
    path = str(tmp_path / "n")
    first = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    first.bind(path)
    notifier = Notifier(path)
    first.close()
    with pytest.raises(ConnectionRefusedError):
        notifier.watchdog()
    os.unlink(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as second:
        second.bind(path)
        notifier.watchdog()
        assert second.recv(100) == b"WATCHDOG=1"
    notifier.close()


def test_from_environ() -> None:
    """The variable is removed; without one there is none; what is not an address is refused with a message."""
    environ = {"NOTIFY_SOCKET": "@gmemd-test-nobody"}
    with pytest.raises(ConnectionRefusedError):
        Notifier.from_environ(environ)
    assert environ == {}
    assert Notifier.from_environ({}) is None
    with pytest.raises(QmpError, match="NOTIFY_SOCKET 'vsock:2:3' is neither"):
        Notifier.from_environ({"NOTIFY_SOCKET": "vsock:2:3"})


class TestListenFds:
    """Only what is meant for this process is taken, at 3 and following."""

    @pytest.fixture(autouse=True)
    def _at_three(self, monkeypatch: pytest.MonkeyPatch, no_fd_is_left: None) -> Iterator[None]:
        """Let "3" be a place that pytest does not use."""
        pair = os.pipe()
        first = 500
        for number, fd in enumerate(pair):
            os.dup2(fd, first + number)
            os.close(fd)
        monkeypatch.setattr(notify, "FIRST_FD", first)
        yield
        os.close(first)
        os.close(first + 1)

    def environ(self, **other: str) -> dict[str, str]:
        return {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2", "LISTEN_FDNAMES": "qmp:m-1", **other}

    def test_taken(self) -> None:
        """With their names, close-on-exec, and the environment is clean afterwards."""
        environ = self.environ(LISTEN_PIDFDID="12", HOME="/")
        assert listen_fds(environ) == [("qmp", 500), ("m-1", 501)]
        assert not os.get_inheritable(500)
        assert environ == {"HOME": "/"}

    def test_meant_for_another_process(self) -> None:
        environ = self.environ(LISTEN_PID="1")
        assert listen_fds(environ) == []
        assert environ == {}
        assert os.get_inheritable(500)

    @pytest.mark.parametrize("count", ["", "-1", "x", "0"])
    def test_no_count(self, count: str) -> None:
        assert listen_fds(self.environ(LISTEN_FDS=count)) == []
        assert listen_fds({}) == []

    def test_too_few_names(self) -> None:
        assert listen_fds(self.environ(LISTEN_FDNAMES="qmp")) == [("qmp", 500), ("unknown", 501)]


def test_limits_from_the_environment() -> None:
    """$FDSTORE where it is given, else $GMEMD_FDSTORE, else the shipped unit's limit."""
    assert store_limit({"GMEMD_FDSTORE": "9"}) == 9
    assert store_limit({"FDSTORE": "64", "GMEMD_FDSTORE": "9"}) == 64
    assert store_limit({"FDSTORE": "64"}) == 64
    assert store_limit({}) == 1024
    assert store_limit({}, assumed=5) == 5
    assert watchdog_seconds({"WATCHDOG_USEC": "2500000"}) == 2.5
    assert watchdog_seconds({"WATCHDOG_USEC": "2500000", "WATCHDOG_PID": "1"}) is None
    assert watchdog_seconds({"WATCHDOG_USEC": "0"}) is None
    assert watchdog_seconds({}) is None


def test_limits_of_the_next_start() -> None:
    """What this start could be given; its own limit is raised, and a container's runner says what it can do."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        assert raised_limit() == 256
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    environ = {"GMEMD_NOFILE": "1000"}
    assert (runner_limit(environ), environ) == (1000, {})
    assert runner_limit({"GMEMD_NOFILE": "many"}) == UNLIMITED
