"""Rooms of a real daemon: clients of several users, a policy, the keeper, and a killed daemon."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gmemd.client.client import Client
from gmemd.errors import QmpError
from tests.daemon import Daemon

SIZE = 1 << 20
ALICE, BOB = 54321, 54322

POLICY = f"""
version = 1
[[rule]]
name = "root"
match = {{ uid = 0 }}
role = "operator"
[[rule]]
name = "tenants"
match = {{ uid = [{ALICE}, {BOB}] }}
role = "tenant"
"""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to connect as other users")


@contextmanager
def user(daemon: Daemon, uid: int) -> Iterator[Client]:
    """A client of a user."""
    os.seteuid(uid)
    try:
        client = daemon.client()
    finally:
        os.seteuid(0)
    with client:
        yield client


@contextmanager
def shared_host(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon to which several users may connect."""
    (tmp_path / "policy.toml").write_text(POLICY)
    with Daemon("--keeper", "--policy", str(tmp_path / "policy.toml"), kernel="simulated", persist="on") as daemon:
        daemon.dir.chmod(0o711)
        daemon.sock.chmod(0o666)
        yield daemon


def add(client: Client, size: int) -> None:
    client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "x", "size": size})


def ids(client: Client) -> list[Any]:
    return sorted((row["id"], row["size"]) for row in client.execute("query-memdev-status"))


def test_two_users_and_the_operator(tmp_path: Path) -> None:
    """Each has its own `x`, also when the next daemon has taken over; the operator sees both, and their events."""
    with shared_host(tmp_path) as daemon:
        with user(daemon, ALICE) as alice, user(daemon, BOB) as bob, daemon.client() as root:
            add(alice, SIZE)
            add(bob, 2 * SIZE)
            add(root, 3 * SIZE)
            assert ids(alice) == [("x", SIZE)]
            assert ids(bob) == [("x", 2 * SIZE)]
            alice.execute("memdev-verify", {"id": "x", "job-id": "j", "chunk": SIZE})
            assert root.wait_event("JOB_STATUS_CHANGE", 20)["data"]["id"] == f"j@{ALICE}"
            assert bob.execute("query-jobs") == []
            _, [fd] = root.execute_fds("memdev-get-fd", {"id": f"x@{BOB}"})
            assert os.fstat(fd).st_size == 2 * SIZE
            os.close(fd)
        daemon.kill()
        every = [("x", 3 * SIZE), (f"x@{ALICE}", SIZE), (f"x@{BOB}", 2 * SIZE)]
        with daemon.client() as root:
            assert ids(root) == every
            root.execute("object-del", {"id": f"x@{BOB}"})
        with user(daemon, ALICE) as alice, user(daemon, BOB) as bob:
            assert (ids(alice), ids(bob)) == ([("x", SIZE)], [])
            with pytest.raises(QmpError, match=f"^object 'x@{ALICE}' not found$"):
                bob.execute("object-del", {"id": f"x@{ALICE}"})
            alice.execute("object-del", {"id": "x"})
        daemon.kill()
        with daemon.client() as root:
            assert ids(root) == every[:1]
