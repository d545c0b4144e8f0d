"""Nothing opens a client's path with the daemon's rights except below the roots that its rights name."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from gmemd.authority.rights import Rights, Role
from gmemd.commands.stopping import Qmp
from gmemd.errors import QmpError
from gmemd.kernel.beneath import ANYWHERE, Paths
from tests.commands.conftest import Machine

MIB = 1 << 20
LEADS_OUT = (errno.ELOOP, errno.EXDEV)


@pytest.fixture
def root(machine: Machine, tmp_path: Path) -> Path:
    """The one directory below which the machine's client may have files opened."""
    place = tmp_path / "root"
    place.mkdir()
    (tmp_path / "other").mkdir()
    machine.rights = Rights(Role.TENANT, paths=(str(tmp_path / "elsewhere"), str(place)))
    return place


def file(path: object, **more: Any) -> dict[str, Any]:
    return {"qom_type": "memory-backend-file", "id": "m", "size": MIB, "mem_path": str(path), "share": True, **more}


def test_files_below_the_root(machine: Machine, root: Path) -> None:
    """New ones, present ones, deeper ones, and a directory, in which nothing is left."""
    (root / "deep").mkdir()
    (root / "there").write_bytes(bytes(MIB))
    for path in (root / "new", root / "there", root / "deep" / "new", root / "deep" / ".." / "new", root / "deep"):
        assert machine.run("object-add", **file(path)) == {}
        assert machine.run("object-del", id="m") == {}
    assert [path.name for path in (root / "deep").iterdir()] == ["new"]


@pytest.mark.parametrize("path", ["/etc/passwd", "new", "{root}/../other/new", "{root}-not/new", "{other}/new"])
def test_files_elsewhere(machine: Machine, root: Path, path: str) -> None:
    """Are refused by their name, whether they exist or not."""
    path = path.format(root=root, other=root.parent / "other")
    assert machine.refusal("object-add", **file(path)) == ("GenericError", f"path '{path}' is disabled by policy")
    assert machine.run("object-add", **file(root / "new")) == {}


@pytest.mark.parametrize("readonly", [False, True])
def test_links_that_lead_out(machine: Machine, root: Path, *, readonly: bool) -> None:
    """Neither the file nor a directory on the way may be one, and nothing appears at the other end."""
    other = root.parent / "other"
    (other / "file").write_bytes(bytes(MIB))
    (root / "directory").symlink_to(other)
    (root / "file").symlink_to(other / "file")
    (root / "dangling").symlink_to(other / "missing")
    for name in ("directory/file", "directory/new", "directory", "file", "dangling"):
        _, words = machine.refusal("object-add", **file(root / name, readonly=readonly, rom="off" if not readonly
                                                         else "auto"))
        assert words.startswith(f"can't open backing store {root / name} for guest RAM: ")
    assert [path.name for path in other.iterdir()] == ["file"]
    (other / "file").unlink()


def test_what_was_created_in_vain_is_removed(machine: Machine, root: Path) -> None:
    """From where it was created."""
    machine.refusal("object-add", **file(root / "new", align=3))
    assert list(root.iterdir()) == []


def test_only_a_policy_has_roots(tmp_path: Path) -> None:
    """Without one a link is followed, as ever."""
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert ANYWHERE.stat(str(tmp_path / "link")).st_size == 1
    os.close(ANYWHERE.open(str(tmp_path / "link"), os.O_RDONLY))
    ANYWHERE.unlink(str(tmp_path / "link"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_parent_that_is_exchanged(tmp_path: Path) -> None:
    """What is removed is below the root, whatever its name leads to by then."""
    root, other = tmp_path / "root", tmp_path / "other"
    (root / "deep").mkdir(parents=True)
    other.mkdir()
    for place in (root / "deep", other):
        (place / "file").write_bytes(b"x")
    (root / "deep").rename(root / "was")
    (root / "deep").symlink_to(other)
    for call in (Paths(str(root)).unlink, Paths(str(root)).stat):
        with pytest.raises(OSError) as caught:
            call(str(root / "deep" / "file"))
        assert caught.value.errno in LEADS_OUT
    assert (other / "file").exists()
    Paths(str(root)).unlink(str(root / "was" / "file"))
    assert not (root / "was" / "file").exists()


def test_the_socket_of_a_vmm(machine: Machine, root: Path) -> None:
    """Is connected to only below the root: refused by its name, and not found through a link."""
    other = root.parent / "other" / "qmp"
    assert machine.run("object-add", qom_type="memory-backend-memfd", id="m", size=MIB) == {}
    words = f"path '{other}' is disabled by policy"
    assert machine.refusal("memdev-clone", template="m", id="c", copy=True,
                           fence={"via": "qmp", "qmp": str(other)})[1] == words
    vmm = {"pid": os.getpid(), "qmp": str(other)}
    assert machine.refusal("memdev-handover", ids=["m"], old=vmm, new=vmm)[1] == words
    (root / "qmp").symlink_to(other)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(other))
        listener.listen()
        listener.setblocking(False)
        fence = Qmp(machine.gmemd, machine.gmemd.objects.find("m"), 100, str(root / "qmp"))
        fence.paths = Paths(str(root))
        with pytest.raises(QmpError, match=r"cannot connect to .* levels of symbolic links"):
            fence._connect()
        with pytest.raises(BlockingIOError):
            listener.accept()
        other.rename(root / "real")
        fence.path = str(root / "real")
        with pytest.raises(QmpError, match="does not answer as a QMP server"):
            fence._connect()
        listener.accept()[0].close()
