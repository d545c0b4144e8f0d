"""What is ours alone is made so, whatever the umask, and whatever somebody else has left in its place."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from gmemd.errors import QmpError
from gmemd.persist.manager import Manager
from gmemd.persist.record import Record, row_of
from gmemd.persist.registry import Registry
from gmemd.posix.private import exposed, make_private
from tests.persist.manager import StandIn


@pytest.fixture(params=[0o000, 0o022, 0o777])
def any_umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """Each of them in turn, from one that gives everything to one that gives nothing."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_registry_is_private(tmp_path: Path, any_umask: int) -> None:
    """The file, its journal while it is written, and the copy that takes its place, are for this user alone."""
    path = tmp_path / "registry"
    registry = Registry(str(path))
    assert mode(path) == 0o600
    journal = path.with_name("registry-journal")
    assert not journal.exists() or mode(journal) == 0o600
    path.unlink()
    registry.apply(put=[row_of(Record("a", "memory-backend-memfd", {}, "memfd", 4096))], last_seq=1)
    assert mode(path) == 0o600
    registry.close()


def test_registry_that_others_could_open_is_taken_from_them(tmp_path: Path) -> None:
    """It goes on to be used, and the operator is told."""
    path = tmp_path / "registry"
    Registry(str(path)).close()
    path.chmod(0o666)
    registry = Registry(str(path))
    assert mode(path) == 0o600
    assert registry.tightened == f"others could open '{path}' (mode 0666): it is 0600 now"
    registry.close()
    again = Registry(str(path))
    assert again.tightened == ""
    again.close()


def test_registry_that_is_a_link_is_refused(tmp_path: Path) -> None:
    """Nothing is written to what it points to."""
    precious, path = tmp_path / "precious", tmp_path / "registry"
    precious.write_bytes(b"")
    for target in (precious, tmp_path / "nothing"):
        path.symlink_to(target)
        with pytest.raises(QmpError, match="cannot be used: it is a symbolic link"):
            Registry(str(path))
        path.unlink()
    assert precious.read_bytes() == b""
    assert not (tmp_path / "nothing").exists()
    Registry(str(path)).close()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to give a file away")
@pytest.mark.parametrize("name", ["registry", "registry-journal"])
def test_registry_of_somebody_else_is_refused(tmp_path: Path, name: str) -> None:
    """What another user has put there, be it a journal to be rolled back, is not believed."""
    path = tmp_path / "registry"
    if name == "registry":
        Registry(str(path)).close()
    (tmp_path / name).touch()
    os.chown(tmp_path / name, 12345, 12345)
    with pytest.raises(QmpError, match="cannot be used: it belongs to user 12345"):
        Registry(str(path))
    os.chown(tmp_path, 12345, 12345)  # then it is that user's, whom root may look after
    Registry(str(path)).close()


def test_reader_cannot_lock_what_is_private(tmp_path: Path) -> None:
    """A registry in use is refused to a second daemon of this user, with a clear word."""
    path = str(tmp_path / "registry")
    first = Registry(path)
    with pytest.raises(QmpError, match="is in use by another process"):
        Registry(path)
    first.close()
    sqlite3.connect(path).close()


def test_state_directory(tmp_path: Path, stand_in: StandIn, any_umask: int) -> None:
    """All of it that is made is made for this user alone; one that others can write is refused."""
    manager, opened = Manager({"NOTIFY_SOCKET": stand_in.address, "FDSTORE": "9"}), ExitStack()
    manager.disturb(lambda notifier: opened.enter_context(closing(notifier)))
    directory = tmp_path / "a" / "b"
    custody = manager.custody("on", str(directory))
    assert custody is not None
    custody.close()
    assert (mode(tmp_path / "a"), mode(directory)) == (0o700, 0o700)
    (tmp_path / "a").chmod(0o777)
    with pytest.raises(QmpError, match=f"'{tmp_path}/a' can be written by others"):
        manager.custody("on", str(directory))
    (tmp_path / "a").chmod(0o755)
    custody = manager.custody("on", str(directory))
    assert custody is not None
    custody.close()
    opened.close()


def test_exposed_looks_at_links_too(tmp_path: Path) -> None:
    """A link in a directory of others leads wherever they like."""
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "safe").mkdir()
    (tmp_path / "open" / "link").symlink_to(tmp_path / "safe")
    assert exposed(str(tmp_path / "safe")) == ""
    assert exposed(str(tmp_path / "open" / "link")) == str(tmp_path / "open")
    assert exposed(str(tmp_path / "nowhere")) == ""


def test_what_cannot_be_made_is_left_to_its_user(tmp_path: Path) -> None:
    """A directory in its place, or none around it: opening will say so."""
    assert make_private(str(tmp_path)) == ""
    assert make_private(str(tmp_path / "none" / "file")) == ""
