"""A sample of what script/robustness does with quotas: the ledger is what there is, whatever fails or is killed."""

from __future__ import annotations

import pytest

from tests.robustness.quotas import run


@pytest.fixture(autouse=True)
def no_fd_is_left() -> None:
    """The machine itself looks, after each step."""


def test_the_ledger_is_what_there_is() -> None:
    """After each step, and everything that matters has happened."""
    steps = run(600)
    assert min(steps[name] for name in (
        "above a limit", "killed in a flush", "flush fails", "memdev-clone done", "memdev-adopt done",
        "memdev-convert done", "memdev-populate done", "add-fd refused", "object-add done", "object-add refused")) > 0
