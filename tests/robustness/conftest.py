"""What the tests of robustness need."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.robustness.tracer import CAN_FAIL, why_not
from tests.robustness.world import World

_WHY_NOT = why_not()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what has to stop a daemon at a system call where that is not allowed."""
    why = _WHY_NOT or ("" if CAN_FAIL else "makes system calls fail on x86-64 only")
    for item in items:
        if why and "world" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.skip(reason=f"needs ptrace: {why}"))


@pytest.fixture(autouse=True)
def no_fd_is_left() -> Iterator[None]:
    """Every test closes what it opens."""
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert before == len(os.listdir("/proc/self/fd"))


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A kept daemon that comes back quickly, for all tests of a module."""
    with World() as world:
        yield world
