"""What one flush carries: the operations noted since the last one, and their progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from gmemd.persist.record import Record


@dataclass(slots=True, eq=False)
class Operation:
    """One pending change. `fd` is borrowed until the flush that carries it has ended, or is its own."""

    kind: Literal["add", "remove", "update"]
    record: Record
    fd: int = -1  # of an add; -1: the object has none
    close_own: Callable[[int], None] | None = None  # closes an fd of its own
    late: bool = False  # the removes must be done before it: the same open file is leaving under another name
    grouped: bool = False  # it stands with others, or not at all

    def close(self) -> None:
        """Close the fd if it is its own: it has been sent, or will not be."""
        close_own, self.close_own = self.close_own, None
        if close_own is not None:
            close_own(self.fd)


class Pending:
    """Operations that no flush has taken yet. An add that is removed again in here never happened."""

    def __init__(self) -> None:
        self.operations: dict[int, Operation] = {}  # by id(), in their order
        self._fresh: dict[str, list[Operation]] = {}  # object id: its add here, and the operations after it

    def note(self, operation: Operation) -> Operation | None:
        """Take an operation; an add that it cancels out is returned."""
        id_ = operation.record.id
        chain = self._fresh.get(id_)
        if operation.kind == "add":
            self._fresh[id_] = [operation]
        elif chain is not None:
            if operation.grouped:  # only if the others stand: the add stays, too
                chain.append(operation)
            elif operation.kind == "remove":
                for cancelled in self._fresh.pop(id_):
                    del self.operations[id(cancelled)]
                return chain[0]
            else:
                chain.append(operation)
        self.operations[id(operation)] = operation
        return None

    def withdraw(self, operation: Operation) -> bool:
        """Take an update or a removal back; False: it was not pending."""
        chain = self._fresh.get(operation.record.id, [])
        if operation in chain:
            chain.remove(operation)
        return self.operations.pop(id(operation), None) is not None

    def take(self) -> Batch:
        """All noted operations; nothing is pending afterwards."""
        batch = Batch([*self.operations.values()])
        self.operations = {}
        self._fresh = {}
        return batch


class Batch:
    """Decides what is written and, after a failure, what does not stand; knows neither files nor sockets."""

    grouped = False  # some stand only together: all are done before the commit, which cannot be undone then
    writing = False  # the transaction last tried was that of everything
    trying: Sequence[Record] = ()  # its removes
    committed = False  # everything is
    barrier = -1  # fd

    def __init__(self, operations: list[Operation]) -> None:
        adds: list[Operation] = []
        removes: list[Record] = []
        early: list[Record] = []
        records: dict[str, Record] = {}
        for operation in operations:
            record, kind = operation.record, operation.kind
            if operation.grouped:
                self.grouped = True
            if kind == "remove":
                removes.append(record)
                if not operation.grouped:
                    early.append(record)
                records.pop(record.id, None)
            else:
                if kind == "add":
                    adds.append(operation)
                records[record.id] = record
        self.operations = operations
        self.adds = adds
        self.removes = removes  # not committed yet
        self.records = [*records.values()]  # the last version of each object; to be written after the deletions
        self.last_seq = adds[-1].record.seq if adds else 0  # ascending
        self.unsent = [operation for operation in reversed(adds) if operation.fd >= 0] if adds else []
        self.sent: list[str] = []  # names whose FDSTORE was sent
        self.early = early  # the removes that may be committed before the adds
        self.removals: list[str] = []  # names whose FDSTOREREMOVE the barrier will confirm

    def written(self, removes: Sequence[Record]) -> None:
        """These removes are committed."""
        if removes is self.removes:
            self.removes = []
        else:
            done = set(map(id, removes))
            self.removes = [record for record in self.removes if id(record) not in done]

    def wrote(self) -> None:
        """The transaction last tried has happened after all."""
        self.written(self.trying)
        self.committed = self.writing or not (self.records or self.removes)

    def undone(self) -> list[Operation]:
        """The operations that do not stand, newest first."""
        if not self.committed:
            left = {id(record) for record in self.removes}
            return [op for op in reversed(self.operations) if op.kind != "remove" or id(op.record) in left]
        if self.grouped:
            return []
        added = {operation.record.seq for operation in self.adds}
        return [op for op in reversed(self.operations) if op.kind != "remove" and op.record.seq in added]
