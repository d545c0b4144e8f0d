"""Tombstones: what is left of objects that were moved to another gmemd."""

from __future__ import annotations

from functools import partial

from gmemd.changes.change import Change
from gmemd.commands.context import Gmemd
from gmemd.objects.names import at_home
from gmemd.objects.records import move_of
from gmemd.persist.record import Record


def bury(gmemd: Gmemd, record: Record) -> None:
    """Keep the id of an object that was moved away from being used: the tombstone says where it is."""
    object_id, _ = at_home(record.id)
    gmemd.gone[object_id] = record
    move = move_of(record)
    assert move is not None
    gmemd.objects.bar(object_id, f"object '{object_id}' was moved to {move.peer}: object-del forgets that and frees"
                                 " the id")


def unbury(gmemd: Gmemd, object_id: str) -> None:
    """Remove a tombstone."""
    del gmemd.gone[object_id]
    gmemd.objects.unbar(object_id)


def forget_tombstone(gmemd: Gmemd, object_id: str, change: Change) -> None:
    """Forget where an object was moved to, and free its id."""
    record = gmemd.gone[object_id]
    if change.dry_run:
        change.judged(f"forget where '{object_id}' was moved to", then=partial(unbury, gmemd, object_id))
    if gmemd.custody.keeps:
        change.drop(record)
    unbury(gmemd, object_id)
    change.undo(bury, gmemd, record)
