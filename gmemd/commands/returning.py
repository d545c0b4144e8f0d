"""What a predecessor left comes back, each object into the room that it was in."""

from __future__ import annotations

import contextlib

from gmemd.commands.context import Gmemd
from gmemd.commands.housing import make_room
from gmemd.commands.tombstones import bury
from gmemd.objects.conversion import reconcile
from gmemd.objects.names import at_home
from gmemd.objects.records import TOMBSTONE, objects_of, settle_in
from gmemd.objects.rooms import ROOM, MadeRoom
from gmemd.persist.record import Record
from gmemd.persist.restore import Restored

_WITHOUT_MEMORY = (TOMBSTONE, ROOM)


def adopt_restored(gmemd: Gmemd, restored: Restored) -> None:
    """Take it over."""
    for record in _of_type(restored, ROOM):
        make_room(gmemd, MadeRoom.of(record))
    for record in _of_type(restored, TOMBSTONE):
        bury(gmemd.room_of(at_home(record.id)[1]), record)
    backends, asides = objects_of(
        [entry for entry in restored.objects if entry[0].qom_type not in _WITHOUT_MEMORY], gmemd.schema)
    for backend in backends:
        if backend.aside is not None:
            with contextlib.suppress(OSError):
                reconcile(backend, gmemd.kernel)
    if moved := settle_in(backends, gmemd.kernel):
        gmemd.custody.rewrite(moved)
    for backend in backends:
        assert backend.record is not None
        gmemd.room_of(at_home(backend.record.id)[1]).objects.restore([backend])
    gmemd.unclaimed += asides + restored.unclaimed
    gmemd.counters.restored += len(backends)
    for record in restored.lost:
        object_id, tenant = at_home(record.id)
        room = gmemd.room_of(tenant)
        room.lost[object_id] = record
        room.objects.lose(object_id)


def _of_type(restored: Restored, qom_type: str) -> list[Record]:
    return [record for record, _ in restored.objects if record.qom_type == qom_type]
