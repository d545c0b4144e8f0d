"""A place to listen at: what is in the way stays, and of many who want it at once one gets it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from gmemd.cli.gmemd import parse_qmp
from gmemd.errors import QmpError
from gmemd.keeper.listening import listen_on
from gmemd.keeper.mailbox import Mailbox
from gmemd.posix.sockets import bind_unix, identity, path_of, remove_own, split_unix, taking, written
from gmemd.testing import RunningGmemd
from gmemd.web.address import listen, parse_http
from tests.daemon import Daemon
from tests.patience import PATIENCE

WAYS = {
    "bind_unix": bind_unix,
    "http": lambda path: listen(parse_http(f"unix:{path}")),
    "keeper": lambda path: listen_on(path, 0o660, ""),
    "mailbox": Mailbox,
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> object:
    return WAYS[request.param]


def leave_socket(path: str, kind: int = socket.SOCK_STREAM) -> None:
    """A socket file as a process leaves it that was killed."""
    with socket.socket(socket.AF_UNIX, kind) as gone:
        gone.bind(path)


@pytest.mark.parametrize("what", ["file", "directory", "fifo", "link to a file", "link to a socket", "dangling link"])
def test_only_a_socket_is_removed(what: str, way, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Whatever else is at the path stays as it is, whoever wants to listen there."""
    path, other = tmp_path / "q", tmp_path / "other"
    if what == "file":
        path.write_text("precious")
    elif what == "directory":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    else:
        if what == "link to a file":
            other.write_text("precious")
        elif what == "link to a socket":
            leave_socket(str(other))
        path.symlink_to(other)
    before = {entry.name: entry.lstat() for entry in tmp_path.iterdir()}
    with pytest.raises((QmpError, OSError)) as refused:
        way(str(path))
    assert "not a socket" in getattr(refused.value, "desc", str(refused.value))
    assert {entry.name: entry.lstat().st_ino for entry in tmp_path.iterdir()} == \
        {name: status.st_ino for name, status in before.items()}
    for entry in (path, other):
        if entry.is_file():
            assert entry.read_text() == "precious"
    path.rmdir() if what == "directory" else path.unlink()
    way(str(path)).close()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_sockets_of_every_kind_that_are_served_stay(kind: int, way, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """One that somebody has bound and serves is refused; one that nobody holds any more is replaced."""
    path = str(tmp_path / "q")
    with socket.socket(socket.AF_UNIX, kind) as live:
        live.bind(path)
        if kind != socket.SOCK_DGRAM:
            live.listen()
        own = identity(path)
        with pytest.raises((QmpError, OSError), match="Address already in use"):
            way(path)
        assert identity(path) == own
    way(path).close()
    assert os.listdir(tmp_path) in ([], ["q"])


def test_one_whose_queue_is_full_is_served(tmp_path: Path) -> None:
    """Asking whether a socket is served does not wait for room in its queue."""
    path = str(tmp_path / "q")
    with bind_unix(path, backlog=0), socket.socket(socket.AF_UNIX) as waiting:
        waiting.connect(path)
        with pytest.raises(QmpError, match="Address already in use"):
            bind_unix(path)


def test_whoever_is_just_taking_a_place_has_it(tmp_path: Path) -> None:
    """Bound and not yet listening, a socket looks dead; nobody takes its place away meanwhile."""
    path = str(tmp_path / "q")
    leave_socket(path)
    with socket.socket(socket.AF_UNIX) as first:
        with taking(path):
            first.bind(path)
            with pytest.raises(QmpError, match="Address already in use"):
                bind_unix(path)
            first.listen()
        with pytest.raises(QmpError, match="Address already in use"):
            bind_unix(path)
    assert os.listdir(tmp_path) == ["q"]


def test_of_many_one_gets_a_stale_place(tmp_path: Path) -> None:
    """However many want it at once: one listens in the end, and it is the one at the path."""
    for turn in range(20):
        path = str(tmp_path / f"{turn}")
        leave_socket(path)
        won: list[socket.socket] = []
        start = threading.Barrier(8)

        def want(path: str = path, won: list[socket.socket] = won, start: threading.Barrier = start) -> None:
            start.wait()
            with suppress(QmpError):
                won.append(bind_unix(path))

        threads = [threading.Thread(target=want) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        with won[0] as listener, socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            listener.accept()[0].close()
    assert not [name for name in os.listdir(tmp_path) if not name.isdecimal()]


def test_a_lock_left_behind_does_not_matter(tmp_path: Path) -> None:
    """A process that was killed at it leaves the lock's file; what else has its name is not removed."""
    path = tmp_path / "q"
    lock = tmp_path / "q.gmemd-lock"
    lock.touch()
    bind_unix(str(path)).close()
    assert not lock.exists()
    lock.write_text("somebody's")
    bind_unix(str(path)).close()
    assert lock.read_text() == "somebody's"


def test_only_ones_own_socket_is_removed_at_the_end(tmp_path: Path) -> None:
    """A file that another one has put there meanwhile stays."""
    path = str(tmp_path / "q")
    with bind_unix(path):
        own = identity(path)
        os.rename(path, path + ".old")
        with bind_unix(path):
            remove_own(path, own)
            assert os.path.exists(path)
            remove_own(path, identity(path))
            assert not os.path.exists(path)


def test_a_second_daemon_is_refused_and_the_first_goes_on() -> None:
    """Two starts at one stale socket: one serves, one ends and says why; the file is the server's to its end."""
    with Daemon() as first:
        command = [sys.executable, "-m", "gmemd", "--qmp", f"unix:{first.sock}", "--persist", "off"]
        second = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert second.returncode == 1
        assert "Address already in use" in second.stderr
        with first.client() as client:
            client.execute("query-version")
        assert first.stop(signal.SIGTERM) == 0
        assert not first.sock.exists()


@pytest.mark.parametrize(("text", "parsed"), [
    ("unix:/a/b", ("/a/b", [])),
    ("unix:/a,,b", ("/a,b", [])),
    ("unix:,,", (",", [])),
    ("unix:a,,,b", ("a,", ["b"])),
    ("unix:a,,,,b,pretty=on,wait=off", ("a,,b", ["pretty=on", "wait=off"])),
    ("unix:a,", ("a", [""])),
    ("unix:", None),
    ("unix:,a", None),
    ("/a,,b", None),
    ("tcp:1", None),
])
def test_commas_in_paths_are_doubled(text: str, parsed: object) -> None:
    """As in QEMU's options: of two commas one belongs to the path, a single one ends it."""
    assert split_unix(text) == parsed


def test_options_with_commas() -> None:
    """--qmp and --http are written alike; a client takes a plain path as it stands."""
    assert parse_qmp("unix:/t/a,,b.sock,pretty=on") == ("/t/a,b.sock", True)
    address = parse_http("unix:/t/a,,b.sock")
    assert address is not None
    assert address.path == "/t/a,b.sock"
    with pytest.raises(QmpError, match=r"'b\.sock' is not an option of --http"):
        parse_http("unix:/t/a,b.sock")
    assert path_of("unix:/t/a,,b.sock") == "/t/a,b.sock"
    assert path_of("/t/a,b.sock") == "/t/a,b.sock"
    assert path_of(written("/t/a,,b,.sock")) == "/t/a,,b,.sock"


def test_programs_in_a_directory_with_a_comma(monkeypatch: pytest.MonkeyPatch,
                                              request: pytest.FixtureRequest) -> None:
    """The demo and the fixture for other people's tests work wherever temporary files are."""
    directory = tempfile.mkdtemp(prefix="a,b", dir="/tmp")  # pytest's own path may be too long for sockets below it
    request.addfinalizer(lambda: shutil.rmtree(directory))
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with RunningGmemd() as gmemd, gmemd.client() as client:
        assert gmemd.socket.startswith(str(directory))
        client.execute("query-version")
    command = [sys.executable, "-m", "gmemd", "demo", "--kernel", "simulated"]
    assert subprocess.run(command, stdout=subprocess.PIPE, timeout=PATIENCE, check=False).returncode == 0
