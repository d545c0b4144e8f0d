"""A sample of what script/robustness does with quotas: the ledger is what there is, whatever fails or is killed."""

from __future__ import annotations

import pytest

from tests.robustness.quotas import run


@pytest.fixture(autouse=True)
def no_fd_is_left() -> None:
    """The machine itself looks, after each step."""


def test_the_ledger_is_what_there_is() -> None:
    """After each step; and what matters most has happened."""
    steps = run(600, length=25)
    for name in ("above a limit", "killed", "flush fails", "object-add done", "object-add refused"):
        assert steps[name] > 0, name
