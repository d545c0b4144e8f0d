"""Converts between a piece of memory and its record in the registry: the only code that knows the record's form."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, cast

from gmemd.backends.base import HostMemoryBackend
from gmemd.backends.types import BACKENDS
from gmemd.errors import QmpError, os_errors
from gmemd.kernel.kernel import Kernel
from gmemd.memory.lease import NEVER, Lease
from gmemd.memory.moves import Move
from gmemd.memory.piece import Aside, Piece
from gmemd.memory.ranges import RangeMap
from gmemd.memory.runner import Handover, Runner
from gmemd.objects.names import at_home
from gmemd.persist.record import Record
from gmemd.posix.boottime import from_record, on_the_wall
from gmemd.schema.validate import Schema

TOMBSTONE = "moved"  # the registry's type of what is left of an object that another gmemd owns
_ASIDE = "private-store"  # the registry's type of preserved private bytes
_ASIDE_ID = "{}[private]"  # and their id there, which no object can have


def record_of(piece: Piece, kernel: Kernel) -> Record:
    """The record of a piece; QmpError if it cannot be examined."""
    if piece.parent is not None:
        return Record(_ASIDE_ID.format(piece.name), _ASIDE, {}, "memfd", piece.memory_size)
    backend = cast(HostMemoryBackend, piece)
    uid, pid = backend.owner
    kind = backend.kind
    if kind == "file" and backend.file_kind:
        kind = backend.file_kind
    elif kind == "file":
        with os_errors(f"cannot examine '{backend.id}'"):
            kind = kernel.identify(backend.fd)
    elif backend.properties.get("hugetlb"):
        kind = "hugetlb-memfd"
    return Record(backend.name, backend.qom_type, dict(backend.properties), kind, backend.memory_size,
                  kernel=kernel.name, owner_uid=uid, owner_pid=pid, created=int(on_the_wall(backend.made)),
                  extra=_extra(backend))


def tombstone(backend: HostMemoryBackend, move: Move) -> Record:
    """What is left of an object that another gmemd owns; it takes the place of the object's record."""
    record = backend.record or Record(backend.name, TOMBSTONE, {}, backend.kind, backend.memory_size)
    return record.changed(qom_type=TOMBSTONE, arguments={}, extra={"move": move.dump()}, fd_name="", st_dev=0,
                          st_ino=0, st_size=0)


def settle_in(backends: Iterable[HostMemoryBackend], kernel: Kernel) -> list[Record]:
    """Make objects that have come from another boot what they were; the records to be written."""
    records = []
    for backend in backends:
        if backend.kind == "guest-memfd" and backend.record is not None:
            with suppress(OSError):
                kernel.recall(backend.fd, backend.guest_memfd_flags or 0, backend.record.kernel)
        if backend.record is None or not backend.record.carried:
            continue
        with suppress(QmpError):
            backend.finish(kernel)
        backend.record = updated(backend)
        records += [piece.record for piece in backend.pieces() if piece.record is not None]
    return records


def move_of(record: Record) -> Move | None:
    """The latest move that a record knows of."""
    return Move(**record.extra["move"]) if "move" in record.extra else None


def updated(backend: HostMemoryBackend) -> Record:
    """The record of a kept object whose properties, visibility, lease or fence have changed."""
    assert backend.record is not None
    return backend.record.changed(arguments=dict(backend.properties), extra=_extra(backend))


def _extra(backend: HostMemoryBackend) -> dict[str, Any]:
    extra: dict[str, Any] = {"kind": backend.kind, "flags": backend.guest_memfd_flags, "offset": backend.offset,
                             "made": int(backend.made * 1000) / 1000}  # rounded down: never later than it was
    if backend.account or backend.template or backend.origin:
        extra |= {name: value for name in ("account", "template", "origin") if (value := getattr(backend, name))}
    if backend.visibility is not None:
        extra["visibility"] = backend.visibility.to_json()
    if backend.lease is not None:
        extra["lease"] = backend.lease.dump()
    if backend.generation:
        extra["generation"] = backend.generation
    if backend.runner is not None:
        extra["runner"] = backend.runner.dump()
    if backend.handover is not None:
        extra["handover"] = backend.handover.dump()
    if backend.fence is not None and len(backend.fence) > 1:  # it has stopped somebody
        extra["fence"] = backend.fence
    if backend.move is not None:
        extra["move"] = backend.move.dump()
    return extra


def objects_of(kept: Iterable[tuple[Record, int]], schema: Schema) -> tuple[list[HostMemoryBackend],
                                                                            list[tuple[str, int]]]:
    """The objects of these records and fds, which own the fds from now on.

    Also, by fd-store name, the fds of private bytes whose object did not come back.
    """
    kept = list(kept)
    asides = {record.id: (record, fd) for record, fd in kept if record.qom_type == _ASIDE}
    backends = [backend_of(record, fd, schema) for record, fd in kept if record.qom_type != _ASIDE]
    for backend in backends:
        assert backend.record is not None
        record, fd = asides.pop(_ASIDE_ID.format(backend.record.id), (None, -1))
        if record is not None:
            backend.aside = Aside(backend, fd)
            backend.aside.record = record
    return backends, [(record.fd_name, fd) for record, fd in asides.values()]


def backend_of(record: Record, fd: int, schema: Schema) -> HostMemoryBackend:
    """The object that a record describes, as it was."""
    defaults = {name: declared.default for name, declared in schema.properties(record.qom_type).items()
                if declared.default is not None}
    object_id, _ = at_home(record.id)
    backend = BACKENDS[record.qom_type](object_id, {**defaults, **record.arguments, "prealloc-context": ""})  # not kept
    backend.fd = fd
    backend.memory_size = record.size
    backend.kind = record.extra["kind"]
    if backend.kind == "file":
        backend.file_kind, backend.status = record.kind, os.fstat(fd)
    backend.guest_memfd_flags = record.extra["flags"]
    backend.offset = record.extra["offset"]
    backend.account = record.extra.get("account", "")
    backend.template, backend.origin = record.extra.get("template", ""), record.extra.get("origin", "")
    if "visibility" in record.extra:
        initial, *changes = record.extra["visibility"]
        backend.visibility = RangeMap(record.size, initial, changes)
    if "lease" in record.extra:
        backend.lease = Lease(*record.extra["lease"])
    backend.generation = record.extra.get("generation", 0)
    if "runner" in record.extra:
        backend.runner = Runner(*record.extra["runner"])
    if "handover" in record.extra:
        backend.handover = Handover.load(record.extra["handover"])
    backend.fence = record.extra.get("fence")
    backend.move = move_of(record)
    backend.foreign = True
    backend.owner = (record.owner_uid, record.owner_pid)
    backend.made = from_record(None if record.carried else record.extra.get("made"), record.created)
    backend.record = record
    if record.carried:
        _end_processes(backend)
    return backend


def _end_processes(backend: HostMemoryBackend) -> None:
    """After another boot, none of the processes that a record names is there: the ids are others' by now."""
    backend.fence = backend.handover = None
    for watched in (backend.lease, backend.runner):
        if watched is not None:
            watched.start = NEVER
