"""Made rooms of a real daemon: sockets, a policy by namespace, restarts and kills under the keeper."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gmemd.client.client import Client
from gmemd.errors import QmpError
from tests.daemon import Daemon

MIB = 1 << 20
STRANGER = 54321

POLICY = """
version = 1
[[rule]]
name = "own"
match = {{ uid = {uid} }}
role = "operator"
paths = ["{claims}"]
[[rule]]
name = "pods"
match = {{ namespace = {namespaces} }}
role = "member"
limits = {{ bytes = "3MiB" }}
"""


@contextmanager
def keeper(*arguments: str) -> Iterator[Daemon]:
    """A daemon under a keeper, in whose directory others may search."""
    with Daemon("--keeper", *arguments, kernel="simulated", persist="on") as daemon:
        daemon.dir.chmod(0o711)
        yield daemon


def place(folder: Path) -> str:
    """The path of a room's socket, in a directory of its own."""
    folder.mkdir(exist_ok=True)
    folder.chmod(0o711)
    return str(folder / "qmp.sock")


def memfd(object_id: str, size: int = MIB) -> dict[str, Any]:
    return {"qom-type": "memory-backend-memfd", "id": object_id, "size": size}


def rooms(client: Client) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in client.execute("query-memdev-rooms")}


def written(path: str, byte: bytes = b"") -> bytes:
    """Write to the memory of the `ram` behind a room's socket, if so asked; what is there."""
    with Client(path) as member:
        assert [row["id"] for row in member.execute("query-memdev-status")] == ["ram"]
        _, [fd] = member.execute_fds("memdev-get-fd", {"id": "ram"})
    try:
        os.pwrite(fd, byte, 0)
        return os.pread(fd, 1, 0)
    finally:
        os.close(fd)


def test_two_rooms_across_a_restart() -> None:
    """Each has its memory behind its own socket before and after, and the other's is not there."""
    with keeper() as daemon:
        paths = {name: place(daemon.dir / name) for name in ("a", "b")}
        with daemon.client() as house:
            for name, path in paths.items():
                house.execute("memdev-transaction", {"actions": [
                    {"type": "memdev-room-add", "data": {"id": name, "socket": path, "note": name}},
                    {"type": "object-add", "data": memfd(f"ram@{name}")}]})
                assert written(path, name.encode()) == name.encode()
        daemon.kill()
        with daemon.client() as house:
            assert {name: (row["note"], row["objects"]) for name, row in rooms(house).items()} == {
                "a": ("a", 1), "b": ("b", 1)}
            assert {name: written(path) for name, path in paths.items()} == {"a": b"a", "b": b"b"}
            with Client(paths["a"]) as member:
                assert rooms(house)["a"]["clients"] == 1
                house.execute("object-del", {"id": "ram@a"})
                house.execute("memdev-room-del", {"id": "a"})
                with pytest.raises(OSError):
                    member.execute("query-version")
            assert not os.path.exists(paths["a"])
        daemon.kill()
        with daemon.client() as house:
            assert rooms(house).keys() == {"b"}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to connect as another user")
def test_the_directory_is_the_fence() -> None:
    """Whoever can reach the socket is a member, whatever its user is."""
    with keeper() as daemon:
        path = place(daemon.dir / "a")
        with daemon.client() as house:
            house.execute("memdev-room-add", {"id": "a", "socket": path})
            house.execute("object-add", memfd("ram@a"))
        os.seteuid(STRANGER)
        try:
            assert written(path, b"s") == b"s"
            with Client(path) as member, pytest.raises(QmpError, match=r"^Command object-del disabled by policy$"):
                member.execute("object-del", {"id": "ram"})
        finally:
            os.seteuid(0)
        Path(path).parent.chmod(0o700)
        os.seteuid(STRANGER)
        try:
            with pytest.raises(OSError):
                Client(path, timeout=0.1)
        finally:
            os.seteuid(0)


def test_a_socket_that_cannot_be_made_again() -> None:
    """The room and its memory are there all the same; made again with the same words, it listens."""
    with keeper() as daemon:
        path = place(daemon.dir / "a")
        asked = {"id": "a", "socket": path, "note": "n"}
        with daemon.client() as house:
            house.execute("memdev-room-add", asked)
            house.execute("object-add", memfd("ram@a"))
            with pytest.raises(QmpError, match=r"^room 'a' exists already$"):
                house.execute("memdev-room-add", asked)
        written(path, b"a")
        shutil.rmtree(Path(path).parent)
        daemon.kill()
        with daemon.client() as house:
            assert rooms(house)["a"]["trouble"] == f"Failed to bind socket to {path}: No such file or directory"
            with pytest.raises(QmpError, match=f"^Failed to bind socket to {path}: No such file or directory$"):
                house.execute("memdev-room-add", asked)
            place(Path(path).parent)
            with pytest.raises(QmpError, match=r"^room 'a' exists already$"):
                house.execute("memdev-room-add", {**asked, "note": "m"})
            house.execute("memdev-room-add", asked)
            assert "trouble" not in rooms(house)["a"]
        assert written(path) == b"a"


def test_a_policy_by_namespace(tmp_path: Path) -> None:
    """It decides which namespaces have rooms, and what all rooms of one have together, also after a restart."""
    policy, claims, audit = tmp_path / "policy.toml", tmp_path / "claims", tmp_path / "audit"
    claims.mkdir()

    def allow(*namespaces: str) -> None:
        policy.write_text(POLICY.format(uid=os.geteuid(), claims=claims, namespaces=json.dumps(namespaces)))

    allow("team-*", "other")
    with keeper("--policy", str(policy), "--audit", str(audit)) as daemon:
        paths = {name: place(claims / name) for name in ("a", "b", "c")}
        with daemon.client() as house:
            for name, namespace in (("a", "team-1"), ("b", "team-1"), ("c", "team-2")):
                house.execute("memdev-room-add", {"id": name, "socket": paths[name], "namespace": namespace})
            refused = {
                "the policy lets namespace 'x' have nothing": {"namespace": "x"},
                "the policy lets a room without a namespace have nothing": {},
                "path '/elsewhere/s' is disabled by policy": {"namespace": "other", "socket": "/elsewhere/s"}}
            for said, arguments in refused.items():
                with pytest.raises(QmpError, match=f"^{said}$"):
                    house.execute("memdev-room-add", {"id": "d", **arguments})
            house.execute("object-add", memfd("ram@a", 2 * MIB))
            over = f"^the quota of 'bytes' is {3 * MIB}: {2 * MIB} are used, and {2 * MIB} more were asked for$"
            with pytest.raises(QmpError, match=over):
                house.execute("object-add", memfd("ram@b", 2 * MIB))
            house.execute("object-add", memfd("ram@c", 2 * MIB))
        daemon.kill()
        with daemon.client() as house, pytest.raises(QmpError, match=over):
            house.execute("object-add", memfd("ram@b", 2 * MIB))
        with daemon.client() as house, Client(paths["a"]) as one, Client(paths["c"]) as two:
            one.execute("memdev-discard", {"id": "ram", "offset": 0, "size": 4096})
            used = {row["account"]: {item["what"]: item["used"] for item in row["items"]}
                    for row in house.execute("query-memdev-quota")}
            assert (used["namespace:team-1"]["bytes"], used["room:a"]["bytes"], used["room:b"]["bytes"]) == (
                2 * MIB, 2 * MIB, 0)
            assert (used["namespace:team-1"]["clients"], used["namespace:team-2"]["clients"]) == (1, 1)
            allow("team-2")
            os.kill(daemon.daemon(), signal.SIGHUP)
            with pytest.raises(OSError):
                one.wait_event("nothing", 30)
            two.execute("query-version")
            with pytest.raises((QmpError, OSError), match="this client is not let in"):
                Client(paths["a"])
            with pytest.raises(QmpError, match=r"^the quota of 'objects' is 0: "):
                house.execute("object-add", memfd("more@a"))
            house.execute("object-del", {"id": "ram@a"})
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    [line] = [line for line in lines if line["command"] == "memdev-discard"]
    assert (line["room"], line["namespace"], line["role"], line["rule"]) == ("a", "team-1", "member", "pods")


def test_a_link_leads_nowhere(tmp_path: Path) -> None:
    """Where a policy says below which directory sockets are, no link leads out of it."""
    policy, claims, elsewhere = tmp_path / "policy.toml", tmp_path / "claims", tmp_path / "elsewhere"
    for folder in (claims, elsewhere):
        folder.mkdir()
    (claims / "link").symlink_to(elsewhere)
    policy.write_text(POLICY.format(uid=os.geteuid(), claims=claims, namespaces='"team"'))
    with keeper("--policy", str(policy)) as daemon:
        path = place(claims / "a")
        with daemon.client() as house:
            outside = {"id": "a", "socket": str(claims / "link" / "s"), "namespace": "team"}
            with pytest.raises(QmpError, match=r"^Failed to bind socket to .*/claims/link/s: Too many levels of symbo"):
                house.execute("memdev-room-add", outside)
            house.execute("memdev-room-add", {"id": "a", "socket": path, "namespace": "team"})
            house.execute("object-add", memfd("ram@a"))
        written(path, b"a")
        daemon.kill()
        with daemon.client():
            assert written(path) == b"a"
    assert (list(elsewhere.iterdir()), os.listdir(claims / "a")) == ([], [])
