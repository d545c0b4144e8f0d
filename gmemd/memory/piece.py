"""A piece of memory: a range of a descriptor's file. Everything that is kept, measured or handed out is one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from gmemd.errors import QmpError
from gmemd.kernel.syscalls import seals
from gmemd.kernel.uapi import F_SEAL_WRITE

if TYPE_CHECKING:
    from gmemd.persist.record import Record


class Piece:
    """Memory in the file of a descriptor, which it owns."""

    # On the class, because most of it stays the same and there are many pieces.
    fd = -1
    kind = "memfd"  # guest-memfd, memfd or file
    offset = 0  # bytes before it in the file
    memory_size = 0  # bytes
    status: os.stat_result | None = None  # of a file, from when it was examined off the event loop
    record: Record | None = None  # what custody knows of it; None: it is not kept
    parent: Piece | None = None  # the object whose private bytes these are; None: it is an object itself
    id: str

    @property
    def name(self) -> str:
        """Its id or, if it is in a room, that and the room: unique in the registry."""
        return self.id

    @property
    def frozen(self) -> bool:
        """Whether it is sealed against writing. The descriptor itself tells, also after a restart."""
        if self.kind != "memfd" or self.fd < 0:  # the latter: of a trial
            return False
        try:
            return bool((seals(self.fd) or 0) & F_SEAL_WRITE)
        except OSError as exc:  # not by os_errors: many rows of a list ask
            raise QmpError(f"cannot examine '{self.id}': {os.strerror(exc.errno or 0)}") from exc

    def check_writable(self) -> None:
        """Refuse what would write to frozen memory."""
        if self.frozen:
            raise QmpError(f"object '{self.id}' is frozen: its memory never changes again")


class Aside(Piece):
    """A memfd with the preserved private bytes of an object, at their offsets."""

    def __init__(self, parent: Piece, fd: int) -> None:
        self.id = parent.id
        self.parent = parent
        self.fd = fd
        self.memory_size = parent.memory_size

    @property
    def name(self) -> str:
        assert self.parent is not None
        return self.parent.name
