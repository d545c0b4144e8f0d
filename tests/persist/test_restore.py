"""What each fd and each record of a predecessor is taken for."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator

import pytest

from gmemd.persist.record import Record, State
from gmemd.persist.restore import Match, Restored, sequence, sort_out

STATE = State(1, "abcd", 10, 0, 1, ("m-abcd-3",))
Make = Callable[..., tuple[str, int]]


@pytest.fixture
def make(no_fd_is_left: None) -> Iterator[Make]:
    """Make a memfd in the store: (name, fd)."""
    fds = []

    def make(number: int, size: int = 4096, generation: str = "abcd") -> tuple[str, int]:
        fds.append(os.memfd_create("test"))
        os.truncate(fds[-1], size)
        return f"m-{generation}-{number}", fds[-1]

    yield make
    for fd in fds:
        os.close(fd)


def record_for(entry: tuple[str, int], id_: str = "a", kind: str = "memfd") -> Record:
    name, fd = entry
    status = os.fstat(fd)
    return Record(
        id_, "memory-backend-memfd", {}, kind, status.st_size, fd_name=name, st_dev=status.st_dev,
        st_ino=status.st_ino, st_size=status.st_size,
    )  # fmt: skip


def sort(fds: list[tuple[str, int]], *records: Record, trusted: bool = True) -> Restored:
    return sort_out(fds, records, STATE, Match(trusted=trusted))


def test_names() -> None:
    """Only a name of this registry has a sequence number."""
    assert sequence("m-abcd-17", STATE) == 17
    for name in ("m-abce-17", "m-abcd-", "m-abcd-x", "abcd-17", "17", "", "m-abcd-17-18", "s-abcd-17"):
        assert sequence(name, STATE) == 0


def test_whole(make: Make) -> None:
    """In the order of the records; order and other fds of the store mean nothing."""
    entries = [make(number) for number in (1, 2)]
    records = [record_for(entries[1], "b"), record_for(entries[0], "a")]
    found = sort(entries, *records)
    assert vars(found) == vars(Restored()) | {"objects": [(records[0], entries[1][1]), (records[1], entries[0][1])]}


class TestNotTheSame:
    """A record whose fd is another file than it was is lost, and the fd is kept; both are said."""

    def check(self, entry: tuple[str, int], record: Record, words: str) -> None:
        found = sort([entry], record)
        assert (found.objects, found.lost, found.unclaimed) == ([], [record], [entry])
        assert words in found.words[0]

    def test_inode(self, make: Make) -> None:
        entry, other = make(1), make(2)
        record = record_for(other)
        record.fd_name = entry[0]
        self.check(entry, record, "the fd with its name is another file")

    def test_size(self, make: Make) -> None:
        entry = make(1)
        record = record_for(entry)
        os.truncate(entry[1], 8192)
        self.check(entry, record, "its fd has 8192 bytes instead of 4096")

    def test_kind(self, make: Make) -> None:
        entry = make(1)
        record = record_for(entry, kind="guest-memfd")
        found = sort_out([entry], [record], STATE, Match(trusted=True, identify=lambda fd: "memfd"))
        assert found.lost == [record]
        assert "is a memfd instead of a guest-memfd" in found.words[0]

    def test_file_may_grow(self, make: Make) -> None:
        """Others may append to a file on disk, and may not cut it."""
        entry = make(1)
        record = record_for(entry, kind="file")
        os.truncate(entry[1], 8192)
        assert sort([entry], record).objects == [(record, entry[1])]
        os.truncate(entry[1], 100)
        assert sort([entry], record).lost == [record]


@pytest.mark.parametrize(("then", "now"), [("", ""), ("", "b" * 32), ("b" * 32, "")])
def test_where_the_boot_is_not_known(make: Make, monkeypatch: pytest.MonkeyPatch, then: str, now: str) -> None:
    """Hidden by ProcSubset=pid: a file that a live update has carried has no name, and others are what they were."""
    old, new = make(1), make(2)
    record = record_for(old)
    record.boot = then
    match = Match(trusted=True, boot=now)
    assert match.difference(record, old[1]) == ""
    assert "is another file" in match.difference(record, new[1])
    monkeypatch.setattr(os, "readlink", lambda path: "/ (deleted)")
    found = sort_out([(old[0], new[1])], [record], STATE, match)
    assert found.objects == [(record, new[1])]
    assert (record.carried, record.st_ino) == (True, os.fstat(new[1]).st_ino)


class TestWithoutRecord:
    @pytest.mark.parametrize("number", [11, 3])
    def test_dropped(self, make: Make, number: int) -> None:
        """Never acknowledged, or deleted; but only on the word of a registry that is whole."""
        entry = make(number)
        assert sort([entry]).dropped == [entry]
        assert sort([entry], trusted=False).unclaimed == [entry]

    @pytest.mark.parametrize(("number", "generation"), [(10, "abcd"), (11, "abce"), (3, "ffff")])
    def test_kept(self, make: Make, number: int, generation: str) -> None:
        """Acknowledged, or of another registry."""
        entry = make(number, generation=generation)
        assert sort([entry]).unclaimed == [entry]

    def test_record_wins(self, make: Make) -> None:
        """What a record claims is not dropped, whatever else is said of its name."""
        entries = [make(3), make(99)]
        records = [record_for(entry, entry[0]) for entry in entries]
        assert [record for record, _ in sort(entries, *records).objects] == records

    def test_one_name_twice(self, make: Make) -> None:
        """The one that the record describes is the object's."""
        first, second = make(1), make(1)
        record = record_for(second)
        found = sort([first, second], record)
        assert (found.objects, found.unclaimed) == ([(record, second[1])], [first])

    def test_sockets_are_apart(self, make: Make) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            entry = ("m-abcd-99", sock.fileno())
            assert sort([entry]).sockets == [entry]
