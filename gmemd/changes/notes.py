"""What a change tells custody to keep, to rewrite and to forget.

It is noted in the order of the calls, with how it is undone, and custody is given all of it at once. Nothing of it has
an effect where objects are not kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from gmemd.changes.settling import Settler
from gmemd.changes.steps import Step
from gmemd.errors import os_errors

if TYPE_CHECKING:
    from gmemd.backends.base import HostMemoryBackend
    from gmemd.memory.piece import Piece
    from gmemd.persist.batch import Operation
    from gmemd.persist.fdstore import Again
    from gmemd.persist.record import Record


@cache
def _records() -> Any:
    from gmemd.objects import records  # not at start

    return records


class Notes:
    """The part of a change that is for custody, and how it is undone."""

    _settler: Settler
    pending: bool  # something is to be done when it is concluded
    _undo: tuple[Step, ...]
    _notes: tuple[Callable[[], Operation], ...]  # operations for custody
    _reserved: int  # reserved places in custody
    operations: Sequence[Operation] = ()  # operations that custody has

    def undo(self, function: Callable[..., object], *arguments: object) -> None:
        """Register how to undo what comes next, or was just done."""
        self._undo += ((function, arguments),)

    def reserve(self) -> None:
        """Reserve room in custody for one more piece until `keep`; QmpError if there is none."""
        custody = self._settler.custody
        if custody.keeps:
            custody.reserve()
            self._reserved += 1
            self.pending = True

    def keep(self, piece: Piece, *, again: Again | None = None) -> None:
        """Give a piece to custody, using up a reservation; `again` as for Custody.add."""
        custody = self._settler.custody
        if custody.keeps:
            self._record(piece, _records().record_of(piece, self._settler.kernel))
            self._note(partial(self._add, piece, again))

    def keep_stored(self, piece: Piece, name: str) -> None:
        """The same for a piece that the service manager already has under this name."""
        custody = self._settler.custody
        if custody.keeps:
            record = _records().record_of(piece, self._settler.kernel)
            with os_errors(f"cannot examine '{name}'"):
                status = os.fstat(piece.fd)
            record.fd_name, record.st_size = name, status.st_size
            record.st_dev, record.st_ino = status.st_dev, status.st_ino
            self._record(piece, record)
            self._note(partial(custody.add, record))

    def rewrite(self, backend: HostMemoryBackend) -> None:
        """Update the record of an object, if it is kept, with its properties, visibility and lease."""
        custody = self._settler.custody
        if custody.keeps and backend.record is not None:
            self._record(backend, _records().updated(backend))
            self._note(partial(custody.update, backend.record))

    def forget(self, piece: Piece) -> None:
        """Remove a piece, if it is kept, from custody."""
        if piece.record is not None:
            self.drop(piece.record)
            self._record(piece, None)

    def drop(self, record: Record) -> None:
        """Remove what a record describes, whether it came back or not, from custody."""
        custody = self._settler.custody
        assert custody.keeps
        custody.check_writable()  # before it is taken from where it stands among the others
        self._note(partial(custody.remove, record))

    def enter(self, record: Record) -> None:
        """Keep a record without memory."""
        custody = self._settler.custody
        assert custody.keeps
        custody.check_writable()
        self._note(partial(custody.add, record))

    def bury(self, backend: HostMemoryBackend, record: Record) -> None:
        """Keep a record without memory, in the place of the object's if that is kept."""
        custody = self._settler.custody
        if custody.keeps:
            if backend.record is None:
                self.enter(record)
            else:
                custody.check_writable()
                self._note(partial(custody.update, record))
                self.let_go(backend.record.fd_name)
                self._record(backend, None)

    def let_go(self, name: str) -> None:
        """Remove a descriptor without a record from the service manager's store, by its name there."""
        custody = self._settler.custody
        if custody.keeps:
            self._note(partial(custody.give_up, name))

    def _note(self, note: Callable[[], Operation]) -> None:
        self._notes += (note,)
        self.pending = True

    def _record(self, piece: Piece, record: Record | None) -> None:
        before, piece.record = piece.record, record

        def undo() -> None:
            piece.record = before

        self.undo(undo)

    def _add(self, piece: Piece, again: Again | None) -> Operation:
        custody = self._settler.custody
        assert custody.keeps
        assert piece.record is not None
        operation = custody.add(piece.record, piece.fd, again=again, status=piece.status)
        self._reserved -= 1
        return operation

    def _give_back(self) -> None:
        while self._reserved:
            self._settler.custody.release()
            self._reserved -= 1

    def _give(self) -> None:
        """Give custody all operations, or none."""
        notes, self._notes = self._notes, ()
        noted: list[Operation] = []
        try:
            for note in notes:
                noted.append(note())
        except BaseException:
            for operation in reversed(noted):
                self._settler.custody.withdraw(operation)
            raise
        self.operations = noted
