"""What one flush carries: the operations noted since the last one, and how far they have come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gmemd.persist.record import Record, Row


@dataclass(slots=True, eq=False)
class Operation:
    """One change on its way. `fd` is borrowed until the flush that carries it has ended."""

    kind: Literal["add", "remove", "update"]
    record: Record
    fd: int = -1  # of an add; -1: the object has none
    row: Row = ()  # what is to be written


class Batch:
    """Decides what is written and, after a failure, what does not stand; knows no file and no socket."""

    def __init__(self, operations: list[Operation]) -> None:
        self.cancelled: list[Operation] = []  # adds that were removed again: never stored
        self.operations = self._net(operations) if len(operations) > 1 else operations
        self.adds: list[Operation] = []
        self.removes: list[Record] = []
        rows: dict[str, Row] = {}
        for operation in self.operations:
            if operation.kind == "remove":
                self.removes.append(operation.record)
                rows.pop(operation.record.id, None)
            else:
                if operation.kind == "add":
                    self.adds.append(operation)
                rows[operation.record.id] = operation.row
        self.rows = list(rows.values())  # the last version of each object; to be written after the deletions
        self.unsent = [operation for operation in reversed(self.adds) if operation.fd >= 0]
        self.sent: list[str] = []  # names whose FDSTORE is on its way
        self.removed = False  # the removes are committed
        self.writing = False  # the transaction last tried was that of everything
        self.committed = False  # everything is
        self.removals: list[str] = []  # names whose FDSTOREREMOVE the barrier will confirm
        self.barrier = -1  # fd

    def _net(self, operations: list[Operation]) -> list[Operation]:
        """Without those that cancel out: an object added here and removed here."""
        fresh: dict[str, list[Operation]] = {}  # id: the add and what followed on it
        gone: set[int] = set()
        for operation in operations:
            id_ = operation.record.id
            if operation.kind == "add":
                fresh[id_] = [operation]
            elif id_ in fresh:
                fresh[id_].append(operation)
                if operation.kind == "remove":
                    chain = fresh.pop(id_)
                    self.cancelled.append(chain[0])
                    gone.update(map(id, chain))
        return [operation for operation in operations if id(operation) not in gone] if gone else operations

    def undone(self) -> list[Operation]:
        """The operations that do not stand, newest first."""
        if not self.committed:
            return [op for op in reversed(self.operations) if not (self.removed and op.kind == "remove")]
        added = {operation.record.seq for operation in self.adds}
        return [op for op in reversed(self.operations) if op.kind != "remove" and op.record.seq in added]
