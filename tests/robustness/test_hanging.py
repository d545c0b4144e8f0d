"""The server of a file system stops answering: only clients that need it wait."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gmemd.client.client import Client
from tests.daemon import Daemon
from tests.patience import PATIENCE, wait_for
from tests.robustness.fuse import FrozenFiles
from tests.robustness.world import World

SIZE = 1 << 20


@pytest.fixture
def frozen(tmp_path: Path) -> Iterator[FrozenFiles]:
    directory = tmp_path / "fuse"
    directory.mkdir()
    try:
        files = FrozenFiles(directory, SIZE)
    except OSError as exc:
        pytest.skip(f"needs to mount FUSE: {exc.strerror}")
    with files:
        yield files


@pytest.fixture
def world() -> Iterator[World]:
    with World(warm=False) as world:
        yield world


Act = Callable[[Client], Any]


def opened(path: Path, command: str, client: Client, **arguments: Any) -> Any:
    """Send a command with a descriptor of the file."""
    fd = os.open(path, os.O_RDWR)
    try:
        return client.execute(command, arguments, fds=[fd])
    finally:
        os.close(fd)


def adopted_again(client: Client) -> None:
    """Adopt the open file of an object as another."""
    _, [fd] = client.execute_fds("memdev-get-fd", {"id": "m"})
    try:
        client.execute("getfd", {"fdname": "again"}, fds=[fd])
    finally:
        os.close(fd)
    client.execute("memdev-adopt", {"id": "n", "fdname": "again"})


def acts(path: Path) -> list[tuple[str, Act]]:
    """What is done to a file, one after the other."""
    add = {"qom-type": "memory-backend-file", "id": "m", "size": SIZE, "mem-path": str(path), "share": True}
    return [
        ("object-add", lambda client: client.execute("object-add", add)),
        ("query-memdev-status", lambda client: client.execute("query-memdev-status")),
        ("query-memdev-accounting", lambda client: client.execute("query-memdev-accounting")),
        ("query-memdev-holders", lambda client: client.execute("query-memdev-holders", {"id": "m"})),
        ("memdev-get-fd", lambda client: client.execute("memdev-get-fd", {"id": "m", "lease": "keep"})),
        ("qom-set", lambda client: client.execute("qom-set", {"path": "m", "property": "dump", "value": False})),
        ("query-command-effect", lambda client: client.execute(
            "query-command-effect", {"command": "object-del", "arguments": {"id": "m"}})),
        ("qom-list", lambda client: client.execute("qom-list", {"path": "/objects/m"})),
        ("memdev-discard", lambda client: client.execute("memdev-discard", {"id": "m", "offset": 0, "size": 4096})),
        ("adopted again", adopted_again),
        ("object-del of that copy", lambda client: client.execute("object-del", {"id": "n"})),
        ("memdev-persist off", lambda client: client.execute("memdev-persist", {"id": "m", "persist": False})),
        ("memdev-persist on", lambda client: client.execute("memdev-persist", {"id": "m", "persist": True})),
        ("object-del", lambda client: client.execute("object-del", {"id": "m"})),
        ("memdev-adopt", lambda client: client.execute("memdev-adopt", {"id": "m", "fdname": "f"})),
        ("object-del of that", lambda client: client.execute("object-del", {"id": "m"})),
        ("a descriptor that nobody takes", lambda client: opened(path, "query-status", client)),
    ]


def test_nobody_waits_for_the_server_of_others_files(frozen: FrozenFiles, world: World) -> None:
    """At whichever of its requests the server stops, other clients are answered; when it goes on, all is as it was."""
    struck: Counter[str] = Counter()
    with world.client() as other:
        for after in range(100):
            before = struck.total()
            with world.client() as client:
                for name, act in acts(frozen.path):
                    if name == "memdev-adopt":
                        opened(frozen.path, "getfd", client, fdname="f")
                    frozen.hang(after)
                    struck[name] += _during(act, client, other, frozen, name)
            if struck.total() == before:  # nothing asks the server so often
                break
    assert struck["object-add"] > 5
    assert struck["memdev-adopt"] > 3


def _during(act: Act, client: Client, other: Client, frozen: FrozenFiles, name: str) -> bool:
    """Do something while another client asks; whether it had to wait for the server."""
    done = threading.Event()
    answers: list[Any] = []

    def run() -> None:
        try:
            answers.append(act(client))
        except Exception as exc:
            answers.append(exc)
        finally:
            done.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(5):
            other.execute("query-status")
        done.wait(0.2)
        for _ in range(5):
            other.execute("query-status")
    finally:
        waited = frozen.thaw()
        thread.join(PATIENCE)
    assert done.is_set(), name
    assert not isinstance(answers[0], Exception), (name, json.dumps(str(answers[0])))
    return waited


def test_nobody_waits_for_the_disk_of_the_audit(frozen: FrozenFiles) -> None:
    """Its lines wait, are dropped and counted; reopening it waits off the loop too."""
    ram = {"qom-type": "memory-backend-ram", "id": "m", "size": 4096}
    with Daemon("--audit", str(frozen.path), kernel="simulated") as daemon, daemon.client() as client:
        frozen.hang(0)
        for _ in range(3):
            client.execute("object-add", ram)
            client.execute("object-del", {"id": "m"})
            os.kill(daemon.pid, signal.SIGHUP)
        assert "audit not written" not in daemon.log()
        assert frozen.thaw()
        wait_for(lambda: "audit not written" in daemon.log())  # this server takes no bytes
        client.execute("object-add", ram)
