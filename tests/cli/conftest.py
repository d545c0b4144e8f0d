"""One gmemd for all tests of a module; each test finds it empty."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from gmemd.cli.gmemctl import main
from gmemd.client.client import Client
from tests.daemon import Daemon
from tests.patience import PATIENCE


class Outcome(NamedTuple):
    """What a command line came to."""

    status: int
    out: str
    err: str


Gmemctl = Callable[..., Outcome]


@pytest.fixture(scope="module")
def shared() -> Iterator[Daemon]:
    with Daemon(kernel="simulated") as daemon:
        yield daemon


@pytest.fixture
def client(shared: Daemon) -> Iterator[Client]:
    """A client of the daemon; every object is removed afterwards."""
    with shared.client() as client:
        client.timeout = PATIENCE
        yield client
        for memdev in client.execute("query-memdev"):
            client.execute("object-del", {"id": memdev["id"]})
        for room in client.execute("query-memdev-rooms"):
            client.execute("memdev-room-del", {"id": room["id"]})
        found = client.execute("query-memdev-snapshots")
        for snapshot in sorted(found, key=lambda one: bool(one.get("children"))):
            client.execute("memdev-snapshot-delete", {"name": snapshot["name"]})


@pytest.fixture
def gmemctl(client: Client, shared: Daemon, capfd: pytest.CaptureFixture[str]) -> Gmemctl:
    """Run gmemctl in this process against the daemon."""

    def run(*words: str) -> Outcome:
        try:
            status = main(["--socket", str(shared.sock), *words])
        except SystemExit as end:  # argparse
            status = int(str(end.code))
        return Outcome(status, *capfd.readouterr())

    return run
