"""Fixtures for what outlives the process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from gmemd.persist.notify import Notifier
from tests.persist.manager import KeeperAsManager, StandIn

Manager = StandIn | KeeperAsManager


@pytest.fixture(autouse=True)
def no_fd_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test closes what it opens."""
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert before == len(os.listdir("/proc/self/fd"))


@pytest.fixture
def stand_in(no_fd_is_left: None, tmp_path: Path) -> Iterator[StandIn]:
    manager = StandIn(tmp_path)
    yield manager
    manager.close()


@pytest.fixture(params=["stand-in", "keeper"])
def manager(no_fd_is_left: None, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    """Both in turn, with room for three fds."""
    if request.param == "keeper":
        keeper = KeeperAsManager(3)
        yield keeper
        keeper.close()
        return
    stand_in = StandIn(tmp_path, 3)
    yield stand_in
    stand_in.close()


@pytest.fixture
def notifier(manager: Manager) -> Iterator[Notifier]:
    """A connection to the manager."""
    notifier = Notifier(manager.address)
    yield notifier
    notifier.close()
