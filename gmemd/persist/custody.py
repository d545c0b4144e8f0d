"""Keep objects beyond the process: fd in the service manager's store and record in the registry, or neither.

The promise: an operation whose flush has ended is durable, whatever kills the process afterwards; one whose flush has
not ended is, after a crash, complete or absent. One flush carries all operations gathered since the last one: one
transaction and one barrier for the whole batch (delivery.py has the order).

A flush that fails before its commit undoes everything; if it fails later, removes and updates stand, and adds are
undone by a second transaction.

An fd is dropped only if an intact registry says so: by its own names (they carry its generation), not by their absence
from a new or damaged one. A record without its fd is reported lost and kept until the object is deleted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from time import monotonic
from typing import Literal

from gmemd.errors import QmpError, close_fd
from gmemd.persist.batch import Batch, Operation, Pending
from gmemd.persist.carried import Copy, is_copy
from gmemd.persist.carrier import Carrier
from gmemd.persist.delivery import Delivery, file_of
from gmemd.persist.fdstore import Again, FdStore, is_socket
from gmemd.persist.notify import Notifier
from gmemd.persist.record import Record, row_of
from gmemd.persist.registry import NotWritten, Registry
from gmemd.persist.restore import NO_SEALS, Identify, Match, Restored, name_prefix, sequence, sort_out
from gmemd.persist.waits import Flush, NotKept, block

BARRIER_TIMEOUT = 30.0  # seconds; systemd's daemon-reload with 4,000 fds in the store took 7


class Custody:
    """The objects in the care of the service manager and the registry. Not for use from two threads.

    reserve, add, remove and update only note what is to be done; flush does it.
    """

    keeps: Literal[True] = True

    def __init__(self, registry: Registry, notifier: Notifier, store: FdStore, *,
                 barrier_timeout: float = BARRIER_TIMEOUT, close: Callable[[int], None] = close_fd,
                 carries: bool = False, boot: str = "") -> None:
        """`barrier_timeout`: seconds. `close` closes an fd of custody's own, for a file that others have open too.

        carries: a copy of the registry is kept in the store. boot: this one's id.
        """
        self._registry = registry
        self._store = store
        self._timeout = barrier_timeout
        self._close = close
        self._seq = registry.state.last_seq
        self._prefix = name_prefix(registry.state)
        self._pending = Pending()
        self._delivery = Delivery(registry, notifier, store, timeout=barrier_timeout)
        self.copies = Carrier(registry, store, self._delivery, wanted=carries, boot=boot)
        self._boot = boot
        self._flushing = False
        self._again: Callable[[], Flush] | None = None
        self._due = False  # something is owed, and no later operation needs to wait for it
        self.trouble = ""  # why the last flush failed or left something owed; "" when all is well

    # -- decide ----------------------------------------------------------------------------------------------
    @property
    def read_only(self) -> str:
        """Why nothing can be recorded; "" when all is well."""
        return self._registry.read_only

    @property
    def room(self) -> tuple[int, int]:
        """How many descriptors the manager holds, and how many it can."""
        return len(self._store), self._store.room

    @property
    def steady(self) -> tuple[int, ...]:
        """A value that stays equal as long as the manager is to hold the same; (): that is changing just now."""
        state = self._registry.state
        return () if self._flushing or self.dirty else (state.commits, state.last_seq, len(self._store))

    def allow(self, limit: int, handed_down: int) -> None:
        """Use other limits from now on: the manager's store, and what the next start can be given."""
        self._store.limit, self._store.handed_down = limit, handed_down

    def give_again(self, entries: Callable[[], Iterable[tuple[str, int]]], *, wholly: bool) -> None:
        """Have the next flush send again what the manager has dropped; `entries` then gives all (name, fd), borrowed.

        wholly: it has nothing left. Only then can a file kept under two names be sent twice, as two open files.
        """
        self._again = partial(self._delivery.send_again, lambda: chain(entries(), self.copies.entries()), wholly=wholly)

    @property
    def dirty(self) -> bool:
        """Is there anything for flush to do?"""
        return bool(self._pending.operations) or self._due or self._again is not None or self.copies.asked is not None

    def reserve(self) -> None:
        """Reserve room for one object until add(), which uses it up. QmpError: no room."""
        if self._registry.read_only:
            self.check_writable()
        self._store.reserve()

    def release(self) -> None:
        """Cancel a reservation: the object could not be created."""
        self._store.release()

    def check_writable(self) -> None:
        """Raise QmpError while the registry cannot be written; tries once more."""
        if self._registry.read_only and not self._registry.reopen():
            raise QmpError(f"registry '{self._registry.path}' cannot be written: {self._registry.read_only}")

    # -- note ------------------------------------------------------------------------------------------------
    def add(self, record: Record, fd: int = -1, *, again: Again | None = None,
            status: os.stat_result | None = None) -> Operation:
        """Take an object into custody. The fd is borrowed until the flush has ended; -1: the object has none.

        The record now belongs to the flush, which writes it. `again`: opens it once more, because the same open file
        may be in custody already, under another name; QmpError if it cannot be kept under two. `status`: of the fd,
        where asking for it here could take long.

        Every add of an fd uses up one reservation. Fills in the second group of the record's members.
        """
        if fd >= 0:
            try:
                status = status or os.fstat(fd)
            except OSError as exc:  # not by os_errors, which costs as much as the rest
                raise QmpError(f"cannot examine memory to be kept: {os.strerror(exc.errno or 0)}") from exc
            file = status.st_dev, status.st_ino
            stored, late = (fd, False) if again is None else self._store.entry_for(fd, file, again)
        else:  # which no reservation has asked for
            self.check_writable()
        self._seq += 1
        record.seq = self._seq
        record.boot = self._boot
        if status is None or fd < 0:
            return self._note(Operation("add", record))
        record.st_dev, record.st_ino, record.st_size = status.st_dev, status.st_ino, status.st_size
        record.fd_name = f"{self._prefix}{self._seq}"
        self._store.add_file(record.fd_name, file)
        operation = Operation("add", record, stored, None if stored == fd else self._close, late)
        self._pending.note(operation)
        return operation

    def remove(self, record: Record, *, grouped: bool = False) -> Operation:
        """Remove an object. Keep its fd open until the flush has ended: an undo needs it.

        grouped: it stands with others, or not at all.
        """
        if self._registry.read_only:
            self.check_writable()
        operation = Operation("remove", record, grouped=grouped)
        cancelled = self._pending.note(operation)
        if cancelled is not None:
            self._delivery.release([cancelled])
        elif record.fd_name:
            self._store.leave((record.fd_name,))
        return operation

    def update(self, record: Record) -> Operation:
        """Write a changed record; the second group of its members stays as add() set it."""
        self.check_writable()
        return self._note(Operation("update", record))

    def withdraw(self, operation: Operation) -> None:
        """Take back what was noted in this turn, the last first; what an add and its removal left cannot be."""
        if operation.kind == "add":
            self.remove(operation.record)
        elif self._pending.withdraw(operation) and operation.kind == "remove":
            self._store.leaving.discard(operation.record.fd_name)

    def give_up(self, name: str) -> Operation:
        """Remove an unclaimed fd from the store with the next flush, and all others of this name."""
        return self.remove(Record("", "", {}, "", 0, fd_name=name))

    def discard(self, name: str) -> None:
        """Remove an unclaimed fd from the store for good, with all others of this name."""
        self._delivery.owe([name])
        self._due = True

    def retry(self) -> None:
        """Let the next flush try what is owed, even if nothing else is to be done; call it now and then."""
        self._due = bool(self._delivery.owed or self._delivery.owed_rows)

    def _note(self, operation: Operation) -> Operation:
        self._pending.note(operation)
        return operation

    # -- act -------------------------------------------------------------------------------------------------
    def flush(self) -> Flush:
        """Make everything noted so far durable; yields what to wait for. Raises NotKept.

        A driver that cannot wait throws its OSError in. Closing the generator leaves everything as a crash would. One
        flush at a time; what is noted meanwhile belongs to the next one, or is undone with this one.
        """
        assert not self._flushing, "a flush is under way"
        batch = self._pending.take()
        self._flushing, self._due = True, False
        again, self._again = self._again, None
        try:
            if again is not None:
                yield from again()
            if self.copies.asked is not None:
                yield from self.copies.renew(batch)
            yield from self._delivery.carry_out(batch)
            self.trouble = ""
        except (OSError, NotWritten) as exc:
            self.copies.take_back(batch)
            self._fail(batch, exc)
        finally:
            self._flushing = False
            self._delivery.end(batch)

    def flush_blocking(self, timeout: float = BARRIER_TIMEOUT) -> None:
        """Flush until nothing is left to do, waiting here at most `timeout` seconds. Raises NotKept."""
        end = monotonic() + timeout
        while self.dirty:
            block(self.flush(), lambda: max(0.0, end - monotonic()))

    def _fail(self, batch: Batch, exc: OSError | NotWritten) -> None:
        """Undo the batch as far as it does not stand, and everything noted after it; raises NotKept."""
        desc = self._describe(exc)
        self.trouble = self._delivery.take_back(batch, exc) or desc
        later = self._pending.take()
        self._delivery.release(later.unsent)
        undone = [*later.undone(), *batch.undone()]
        owed = self._delivery.owed
        self._store.leaving -= {op.record.fd_name for op in undone if op.kind == "remove"} - owed
        self._due = bool(batch.operations and owed)  # a flush of only that is not retried at once
        if undone:
            raise NotKept(desc, undone) from exc

    def _describe(self, exc: OSError | NotWritten) -> str:
        if isinstance(exc, NotWritten):
            return f"registry '{self._registry.path}' cannot be written: {exc}"
        if isinstance(exc, TimeoutError):
            return f"the service manager did not answer within {self._timeout:g} s"
        return f"cannot hand over to the service manager: {os.strerror(exc.errno or 0)}"

    # -- start and end ---------------------------------------------------------------------------------------
    def restore(self, fds: Iterable[tuple[str, int]], identify: Identify | None = None,
                copy: Copy | None = None) -> Restored:
        """Take over what a predecessor left, once, before anything else; `fds` as from listen_fds(), `copy` among them.

        The fds in the answer are the caller's. What is to be dropped is closed here and leaves the store with the first
        flush: `dirty` is true then. With `identify` (Kernel.identify) each fd's kind is checked too.
        """
        fds, copies = [entry for entry in fds if not is_copy(entry[0])], [entry for entry in fds if is_copy(entry[0])]
        registry = self._registry
        trusted = not registry.damage and not registry.read_only
        result = sort_out(fds, registry.records, registry.state, Match(
            trusted=trusted, identify=identify, boot=self._boot, seals=copy.seals if copy else NO_SEALS))
        result.words[:0] = [words for words in (registry.damage, registry.tightened, self._read_only_words()) if words]
        for name, fd in [*fds, *copies]:
            self._account(name, fd)
        # a name is never reused, not even one that may still be leaving
        used = [*(name for name, _ in fds), *registry.state.removing]
        self._seq = max([registry.state.last_seq, *(sequence(name, registry.state) for name in used)])
        for name, fd in [*result.dropped, *self.copies.take_over(copies)]:
            self.discard(name)
            os.close(fd)
        return result

    def rewrite(self, records: list[Record]) -> None:
        """Write what a restart has changed, once, before any flush; what cannot be written stays as it was."""
        try:
            self._registry.apply(put=[row_of(record) for record in records], last_seq=self._registry.state.last_seq)
        except NotWritten:
            self._registry.recover()

    def _account(self, name: str, fd: int) -> None:
        if is_socket(fd):
            self._store.account_socket(name)
        else:
            self._store.account(name)
            self._store.add_file(name, file_of(fd))

    def _read_only_words(self) -> str:
        why, path = self._registry.read_only, self._registry.path
        return f"registry '{path}' cannot be written: {why}; memory is handed out as it is" if why else ""

    def close(self) -> None:
        """Close the registry; nothing is flushed."""
        self.copies.close()
        self._registry.close()
