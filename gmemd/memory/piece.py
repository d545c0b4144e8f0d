"""A piece of memory: a stretch of a file behind a descriptor. All that is kept, measured or handed out is one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gmemd.persist.record import Record


class Piece:
    """Memory behind a descriptor, which it owns."""

    # On the class, for most of it stays so and there are many pieces.
    fd = -1
    kind = "memfd"  # guest-memfd, memfd or file
    offset = 0  # bytes before it in the file
    memory_size = 0  # bytes
    status: os.stat_result | None = None  # of a file, from when it was looked at beside the event loop
    record: Record | None = None  # what custody knows of it; None: nobody keeps it
    parent: Piece | None = None  # the object whose private bytes these are; None: it is an object itself
    id: str


class Aside(Piece):
    """A memfd with the private bytes of an object that were preserved, at their offsets."""

    def __init__(self, parent: Piece, fd: int) -> None:
        self.id = parent.id
        self.parent = parent
        self.fd = fd
        self.memory_size = parent.memory_size
