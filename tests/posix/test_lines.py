"""Lines for a reader that does not read: nobody waits, and missing lines are counted where they are missing."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gmemd.client.client import Client
from gmemd.client.running import RunningGmemd
from gmemd.posix.lines import WAITING_MAX, Lines
from tests.daemon import Daemon
from tests.patience import PATIENCE

LINE = b"%0127d\n"  # 128 bytes


def excuse(count: int) -> bytes:
    return b"%d are missing\n" % count


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Its ends for reading and for writing."""
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def read_all(fd: int, lines: Lines, drained: Callable[[bytes], bool]) -> bytes:
    """What comes, until all is written and there."""
    os.set_blocking(fd, False)
    data, end = b"", time.monotonic() + PATIENCE
    while not (lines.wait(0.001) and drained(data)):
        try:
            data += os.read(fd, 1 << 20)
        except BlockingIOError:
            assert time.monotonic() < end
    return data


def fill(fd: int) -> None:
    """Make a pipe so full that a write to it blocks."""
    os.set_blocking(fd, False)
    for size in (1 << 16, 1):
        try:
            while True:
                os.write(fd, b"\n" * size)
        except BlockingIOError:
            pass
    os.set_blocking(fd, True)


@pytest.mark.parametrize("blocking", [True, False])
def test_nobody_waits_for_a_reader(pipe: tuple[int, int], blocking: bool) -> None:
    """The beginning of what nobody reads is kept; a line after it says how many are missing, then it goes on."""
    fill(pipe[1])
    os.set_blocking(pipe[1], blocking)
    lost: list[str] = []
    resumed: list[int] = []
    lines = Lines(pipe[1], excuse=excuse, lost=lost.append, resumed=resumed.append)
    total = 3 * WAITING_MAX // 128
    for number in range(total):
        lines.write(LINE % number)
    lines.wait_taken()
    assert not lines.wait(0)
    assert lost == ["nobody reads the lines that are waiting"]
    data = read_all(pipe[0], lines, lambda data: b"missing" in data)
    *kept, last = data.lstrip(b"\n").splitlines()
    assert [int(line) for line in kept] == list(range(len(kept)))
    assert last == b"%d are missing" % (total - len(kept))
    assert resumed == [total - len(kept)]
    assert len(kept) * 128 == WAITING_MAX
    lines.write(b"more\n")
    assert read_all(pipe[0], lines, lambda data: b"more" in data) == b"more\n"


def test_what_cannot_be_written_is_counted(tmp_path: Path) -> None:
    """A full disk costs its lines; when there is room again, the next line says how many. Functions keep their turn."""
    lost: list[str] = []
    resumed: list[int] = []
    full, file = os.open("/dev/full", os.O_WRONLY), os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    lines = Lines(full, excuse=excuse, lost=lost.append, resumed=resumed.append)
    for _ in range(3):
        lines.write(b"a\nb\n")
        assert lines.wait(PATIENCE)
    assert (lost, resumed) == (["No space left on device"], [])

    def replace() -> None:
        lines.fd = file

    lines.call(replace)
    lines.write(b"c\n")
    assert lines.wait(PATIENCE)
    assert (tmp_path / "file").read_bytes() == b"6 are missing\nc\n"
    assert (lost, resumed) == (["No space left on device"], [6])
    os.close(full)
    os.close(file)


def test_a_torn_line_is_ended(tmp_path: Path) -> None:
    """What follows a line that was written in part begins on a line of its own."""
    fd = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    lines = Lines(fd, excuse=excuse)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6, before[1]))
    try:
        lines.write(b"one\ntwo\nthree\n")
        assert lines.wait(PATIENCE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    lines.write(b"four\n")
    assert lines.wait(PATIENCE)
    assert (tmp_path / "file").read_bytes() == b"one\ntw\n2 are missing\nfour\n"
    os.close(fd)


@pytest.mark.parametrize("arguments", [(), ("--log-level", "error", "--audit", "-")])
def test_commands_are_answered_though_nobody_reads(pipe: tuple[int, int], arguments: tuple[str, ...]) -> None:
    """A reader of the log or of the audit that has stopped delays neither clients nor the daemon's end."""
    fill(pipe[1])
    ram = {"qom-type": "memory-backend-ram", "id": "m" * 200, "size": 4096}
    with Daemon(*arguments, kernel="simulated", stderr=pipe[1]) as daemon:
        with daemon.client() as client, Client(str(daemon.sock), timeout=PATIENCE) as other:
            for _ in range(500):
                client.execute("object-add", ram)
                client.execute("object-del", {"id": ram["id"]})
            other.execute("query-status")
        assert daemon.stop() == 0


@pytest.mark.parametrize("words", [
    ["gmemd", "--qmp", "unix:/no/such/directory/s"],
    ["gmemd", "--keeper", "--listen", "qmp=/no/such/directory/s"],
    ["gmemd.emulator.main", "-machine", "no-such"],
])
def test_last_words_wait_for_nobody(pipe: tuple[int, int], words: list[str]) -> None:
    """A program that cannot start ends, whether somebody reads why or not."""
    fill(pipe[1])
    assert subprocess.run([sys.executable, "-m", *words], stderr=pipe[1], timeout=PATIENCE, check=False).returncode == 1


def test_an_audit_that_nobody_reads_says_so(tmp_path: Path) -> None:
    """The log tells when lines of the audit are lost; when its reader reads again, both say how many were."""
    path = tmp_path / "audit"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    said = b'"event": "audit not written"'
    daemon = Daemon("--audit", str(path), "--log-level", "warning", kernel="simulated")
    with daemon, daemon.client() as client:
        ram = {"qom-type": "memory-backend-ram", "id": "x" * 30_000, "size": 4096}
        for number in range(70):
            client.execute("object-add", {**ram, "id": f"{ram['id']}{number}"})
        assert daemon.log().count("audit not written") == 1
        data, end = b"", time.monotonic() + PATIENCE
        while "audit goes on" not in daemon.log() or said not in data:
            try:
                data += os.read(reader, 1 << 20)
            except BlockingIOError:
                assert time.monotonic() < end
    os.close(reader)
    assert b'"lost": %d' % (70 - data.count(b'"object-add"')) in data


def test_a_keeper_restarts_though_nobody_reads(pipe: tuple[int, int]) -> None:
    """The keeper's own lines wait for nobody either."""
    fill(pipe[1])
    with RunningGmemd(keep=True, stderr=pipe[1]) as gmemd:
        for _ in range(3):
            gmemd.crash()
        assert gmemd.stop() == 0
