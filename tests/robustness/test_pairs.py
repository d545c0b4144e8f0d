"""Two changes that meet do not harm each other: a sample of script/robustness pairs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import pytest

from gmemd.schema.validate import Schema
from tests.robustness.pairs import OPERATIONS, Alone, Kept, clash, pairs

# Changing commands that no pair is made of, and why.
_ELSEWHERE = {
    "qmp_capabilities": "changes the connection alone",
    "quit": "ends the daemon",
    "memdev-claim": "needs memory that came back without its record",
    "yank": "ends what is stuck, and nothing here can be",
    "memdev-transaction": "tests/commands/test_transaction.py has all pairs inside of one",
    "memdev-prepared": "answers a question: tests/commands/test_lease.py",
    "memdev-track": "needs a holder's userfaultfd: tests/commands/test_track.py",
    "memdev-untrack": "the same",
    "memdev-enforce": "needs a holder's userfaultfd: tests/commands/test_enforce.py",
    "memdev-handover": "needs two VMMs, and makes the object busy: tests/e2e/test_replace.py",
    "memdev-handover-end": "the same",
    "memdev-import": "needs a stream: tests/e2e/test_moving.py",
    "memdev-move": "needs another gmemd, and tests/robustness/moves.py has all its states",
    "memdev-move-resolve": "the same",
    "memdev-room-add": "concerns no object: tests/commands/test_made_rooms.py",
    "memdev-room-del": "the same",
    "memdev-snapshot-import": "needs a file of QEMU's, and no object: tests/snapshots/test_mapped_ram.py",
}


@pytest.mark.parametrize(("make", "every", "after"), [(Alone, 71, 0.0), (Alone, 97, 0.002), (Kept, 97, 0.0)],
                         ids=["alone", "alone, staggered", "kept"])
def test_two_clients_change_one_object(make: Callable[[], Alone | Kept], every: int, after: float,
                                       record_property: Callable[[str, object], None]) -> None:
    """What was acknowledged is what is there, with every byte, and after SIGKILL as well; no descriptor is left."""
    place = make()
    try:
        count = 0
        for first, second in islice(pairs(place), 0, None, every):
            clash(place, first, second, after)
            count += 1
    finally:
        place.close()
    record_property("figure", f"{count} pairs")
    assert count >= 18


def test_every_changing_command_is_there() -> None:
    """A new command that changes something needs an operation."""
    known = {operation.command for operation in OPERATIONS.values()} | _ELSEWHERE.keys()
    assert {name for name, command in Schema.load().commands.items() if not command.reads_only} - known == set()
