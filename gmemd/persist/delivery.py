"""Bring one batch to the service manager and into the registry, or undo it.

The order, and what a restart does about a crash after each step:

  adds     FDSTORE sent            an fd above last_seq without record: never acknowledged, it is dropped
           transaction committed   fd and record: the object is there
  removes  the same transaction    no record, its name in state.removing: the removal is finished
           FDSTOREREMOVE sent
           barrier passed          replies leave; the name leaves state.removing with a later transaction

A batch without removes sends its barrier before the transaction: they are independent, and by the time the transaction
is written the barrier has mostly passed. It needs none if the keeper has promised to take that much: a daemon may end
then, the keeper reads what is in its queue. A message to the keeper has many names, and the last one is the barrier. If
the store is too full for the adds, or has one of their open files under a leaving name, the removes go first. What
cannot be removed or undone at once is owed, and done with the next batch.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Collection, Generator, Iterable
from typing import Any, Literal

from gmemd.persist.batch import Batch, Operation
from gmemd.persist.fdstore import FdStore, File, opened_again
from gmemd.persist.notify import Notifier
from gmemd.persist.record import Record, Row, row_of
from gmemd.persist.registry import NotWritten, Registry
from gmemd.persist.waits import Flush, Wait

_MEMORY = frozenset(("memfd", "hugetlb-memfd", "guest-memfd"))  # fstat(2) of these neither fails nor takes long


class Delivery:
    """Delivers one batch after the other, and remembers what is owed between them."""

    def __init__(self, registry: Registry, notifier: Notifier, store: FdStore, *, timeout: float) -> None:
        """`timeout`: seconds for each wait."""
        self._registry = registry
        self._notifier = notifier
        self._store = store
        self._timeout = timeout
        self.owed: set[str] = set()  # names to be removed from the store
        self.owed_rows: set[str] = set()  # ids of objects whose rows an undo could not delete

    def carry_out(self, batch: Batch) -> Flush:
        """Make a batch durable; OSError or NotWritten when that fails: then take_back() it. Always end() it."""
        if batch.unsent and self._store.leaving and self._must_wait(batch):
            yield from self._make_room(batch)
        removals_follow = bool(self.owed) or bool(batch.removes)
        ask = batch.grouped or not (removals_follow or self._is_promised(batch))
        if batch.unsent:
            yield from self._send_adds(batch, ask=ask)
        if ask and batch.sent and batch.barrier < 0:
            batch.barrier = yield from self._send(self._notifier.barrier)
        if batch.grouped and batch.barrier >= 0:
            yield from self._pass(batch)
        self._write(batch, batch.removes, batch.records)
        batch.committed = True
        if removals_follow:
            yield from self._send_removals(batch, ask=True)
            if batch.barrier < 0:
                batch.barrier = yield from self._send(self._notifier.barrier)
        if batch.barrier >= 0:
            yield from self._pass(batch)
        if batch.removals:
            self.owed = self.owed.difference(batch.removals)  # a new set: an old one stays as large as it was once
            self._store.forget(batch.removals)

    def _is_promised(self, batch: Batch) -> bool:
        """Will all adds be held once they are sent? The keeper promises that of memory, which it can always examine."""
        return not batch.sent and len(batch.unsent) <= self._notifier.promised and all(
            [op.record.kind in _MEMORY for op in batch.unsent])

    def _make_room(self, batch: Batch) -> Flush:
        """Remove first what may be."""
        self._write(batch, batch.early, [])
        yield from self._send_removals(batch, ask=False)
        if batch.removes and self._must_wait(batch):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _must_wait(self, batch: Batch) -> bool:
        """Must leaving names be gone before the adds are sent?"""
        return any(op.late for op in batch.unsent) or self._store.crowded(
            [op.record.fd_name for op in batch.unsent], gone=batch.removals)

    def _pass(self, batch: Batch) -> Flush:
        """Wait for the barrier."""
        if not (yield Wait("readable", batch.barrier, self._timeout)):
            raise TimeoutError
        barrier, batch.barrier = batch.barrier, -1
        self._notifier.passed(barrier)

    def send_again(self, entries: Callable[[], Iterable[tuple[str, int]]], *, wholly: bool) -> Flush:
        """Send again everything to be held; the manager ignores what it already has."""
        sent: set[File] = set()
        for name, fd in entries():
            file = file_of(fd)
            twice = wholly and file in sent
            sent.add(file)
            while name in self._store and name not in self._store.leaving:
                try:
                    self._store_once(name, fd, reopened=twice)
                    break
                except BlockingIOError:
                    yield from self._wait("writable", self._notifier.fileno())

    def store(self, name: str, fd: int) -> Flush:
        """Send one descriptor, which has been accounted for."""
        yield from self._send(self._notifier.store, (name,), (fd,))

    def _store_once(self, name: str, fd: int, *, reopened: bool) -> None:
        other = -1
        if reopened:
            with contextlib.suppress(OSError):
                other = opened_again(fd)
        try:
            self._notifier.store((name,), (fd if other < 0 else other,))
        finally:
            if other >= 0:
                os.close(other)

    def take_back(self, batch: Batch, exc: OSError | NotWritten) -> str:
        """Undo the part of a failed batch that does not stand (batch.undone() has it afterwards); the rest is owed.

        The answer says what could not be undone; "": nothing.
        """
        if isinstance(exc, NotWritten) and self._registry.recover():
            # the transaction happened although it reported an error
            batch.wrote()
            self.owe(self._registry.state.removing)
        self.release(batch.unsent)
        if batch.grouped and batch.committed:  # what it sent has arrived
            return ""
        self.owe(batch.sent)
        if not batch.committed or not batch.adds:
            return ""
        self.owed_rows.update(operation.record.id for operation in batch.adds)
        try:
            self._write(batch, [], [])
        except NotWritten as undoing:
            self._registry.recover()
            return str(undoing)
        return ""

    def end(self, batch: Batch) -> None:
        """Wait no more for the barrier of a batch that has failed."""
        if batch.barrier >= 0:
            self._notifier.abandon(batch.barrier)
            batch.barrier = -1

    def owe(self, names: Collection[str]) -> None:
        """Have these leave the store with the next batch."""
        self.owed.update(names)
        self._store.leave(names)

    def release(self, operations: Iterable[Operation]) -> None:
        """Release the room reserved for adds that were not sent."""
        for operation in operations:
            if operation.fd >= 0:
                self._store.release()
                self._store.drop_file(operation.record.fd_name)
                operation.close()

    def _write(self, batch: Batch, removes: list[Record], records: list[Record]) -> None:
        """One transaction; from now on the removes stand, and their fds are owed."""
        delete, removing = self.owed_rows, self.owed
        if removes:
            delete = {*delete, *[record.id for record in removes]}
            names = [record.fd_name for record in removes if record.fd_name]
            removing = {*removing, *names}
        if delete or records:
            batch.writing, batch.trying = len(records) > 0, removes
            last_seq = self._registry.state.last_seq
            self._registry.apply(put=_rows(records) if records else (), delete=delete, removing=removing,
                                 last_seq=max(last_seq, batch.last_seq) if records else last_seq)
            if self.owed_rows:
                self.owed_rows.clear()
        if removes:
            batch.written(removes)
            self.owe(names)

    def _send_adds(self, batch: Batch, *, ask: bool) -> Flush:
        """Send all adds; ask: the last message shall be the barrier, if it can be."""
        unsent, several = batch.unsent, self._notifier.several
        while unsent:
            operations, names, fds = unsent[-several:], [], []
            del unsent[-several:]
            for operation in reversed(operations):
                name = operation.record.fd_name
                self._store.account_reserved(name)
                batch.sent.append(name)
                names.append(name)
                fds.append(operation.fd)
            last = ask and not unsent
            try:
                batch.barrier = self._notifier.store(names, fds, last)
            except BlockingIOError:
                yield from self._wait("writable", self._notifier.fileno())
                batch.barrier = yield from self._send(self._notifier.store, names, fds, last)
            finally:
                for operation in operations:
                    if operation.close_own is not None:
                        operation.close()

    def _send_removals(self, batch: Batch, *, ask: bool) -> Flush:
        """The same for everything that is owed."""
        names = sorted(self.owed.difference(batch.removals) if batch.removals else self.owed)
        while names:
            step = self._notifier.fitting(names) if len(names) > 1 else 1
            some, names = names[:step], names[step:]
            last = ask and not names
            try:
                batch.barrier = self._notifier.remove(some, last)
            except BlockingIOError:
                yield from self._wait("writable", self._notifier.fileno())
                batch.barrier = yield from self._send(self._notifier.remove, some, last)
            batch.removals += some

    def _send(self, message: Callable[..., Any], *arguments: Any) -> Generator[Wait, bool, Any]:
        """Send a message as soon as the manager's queue has room; what the notifier answers."""
        while True:
            try:
                return message(*arguments)
            except BlockingIOError:
                yield from self._wait("writable", self._notifier.fileno())

    def _wait(self, what: Literal["readable", "writable"], fd: int) -> Flush:
        if not (yield Wait(what, fd, self._timeout)):
            raise TimeoutError


def file_of(fd: int) -> File:
    """The file of a descriptor."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _rows(records: list[Record]) -> list[Row]:
    try:
        return [row_of(record) for record in records]
    except MemoryError as exc:
        raise NotWritten(os.strerror(errno.ENOMEM)) from exc
