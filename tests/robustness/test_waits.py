"""The table of longest waits has every command; what the waits are, script/robustness waits says on a quiet machine."""

from __future__ import annotations

from gmemd.schema.validate import Schema
from tests.robustness.waits import SMALL, measure, table


def test_every_command_is_measured() -> None:
    """A new command needs a row in which it is sent with the largest that it can be about."""
    waits, sent = measure(SMALL)
    assert sorted(set(Schema.load(lab=True).commands) - sent) == []
    assert all(wait.longest > 0 for wait in waits)
    assert len(table(waits).splitlines()) == len(waits) + 4
