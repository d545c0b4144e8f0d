"""What a command sees (`Gmemd`, `Caller`) and what it may return besides a plain value.

A command is a function `name(gmemd, caller, arguments)` with complete, checked arguments.  It returns
- a JSON value, or `bytes` that are JSON already;
- `WithFds`, a value whose reply carries file descriptors;
- `Change`, a value that is acknowledged only when custody has made it durable;
- a coroutine that gives one of these, when the work is long.
It raises QmpError to refuse.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Callable, Coroutine
from types import CoroutineType
from typing import TYPE_CHECKING, Any, Protocol

from gmemd.backends.base import HostMemoryBackend
from gmemd.backends.guest_memfd import reconcile
from gmemd.changes.jobs import Jobs
from gmemd.changes.threads import close_beside
from gmemd.errors import QmpError, close_fd, os_errors
from gmemd.memory.lease import Lease
from gmemd.memory.ranges import RangeMap
from gmemd.objects.container import BACKENDS, Objects
from gmemd.objects.fds import FdSets, NamedFds
from gmemd.objects.qom import Tree
from gmemd.observe.counters import Counters
from gmemd.persist.keeping import Keeping
from gmemd.persist.record import Record
from gmemd.posix.boottime import from_record, on_the_wall
from gmemd.qmp.encode import encode
from gmemd.qmp.session import Session
from gmemd.schema.validate import Schema

if TYPE_CHECKING:
    from gmemd.commands.outlook import Outlook
    from gmemd.kernel.kernel import Kernel
    from gmemd.lab import Lab
    from gmemd.observe.audit import Audit
    from gmemd.persist.batch import Operation
    from gmemd.persist.custody import Custody
    from gmemd.persist.restore import Restored


EVENTS_KEPT = 200  # the latest, for those who come later
PRIVATE_STORE = "private-store"  # the registry's type of such a memfd


Step = Callable[[], "asyncio.Future[None] | None"]


class WithFds:
    """A reply with file descriptors; they belong to it and are closed once it is sent."""

    __slots__ = ("fds", "value")

    def __init__(self, value: Any, fds: list[int]) -> None:
        self.value = value
        self.fds = fds


class Change:
    """A change made in memory that custody has been told of, by `operations`.

    `done` runs when it is durable, `undo` when it could not be made so; the reply waits for either, and for the
    future that it may return.
    """

    __slots__ = ("done", "ending", "error", "operations", "undo", "value")

    def __init__(self, value: Any, *operations: Operation, undo: Step, done: Step | None = None) -> None:
        self.value = value
        self.operations = operations
        self.undo = undo
        self.done = done
        self.error: QmpError | None = None  # set when it was undone
        self.ending: asyncio.Future[None] | None = None  # what `done` or `undo` still waits for


class Caller(Protocol):
    """The monitor that a command came from."""

    session: Session
    uid: int
    pid: int
    named_fds: NamedFds  # its own; they end with it, once its running command has ended

    def is_gone(self) -> bool:
        """Whether nobody will read the answer to what it has sent."""
        ...

    def take_fd(self) -> int:
        """Give away the first fd that came by SCM_RIGHTS and close the rest of its batch; QmpError if none did."""
        ...


class Gmemd:
    """The parts of the daemon that commands work on."""

    def __init__(self, *, schema: Schema, kernel: Kernel, version: dict[str, Any], name: str | None = None,
                 uuid: str | None = None, custody: Custody | None = None) -> None:
        self.schema = schema
        self.kernel = kernel
        self.version = version
        self.name = name
        self.uuid = uuid
        self.custody = custody
        self.keeping = Keeping()
        self.outlook: Outlook | None = None  # keeps that true; None: there is nobody to ask
        self.objects = Objects()
        self.tree = Tree(schema, self.objects)
        self.counters = Counters(schema.commands, schema.reading)
        self.events: deque[tuple[float, str, dict[str, Any]]] = deque(maxlen=EVENTS_KEPT)  # when (seconds), name, data
        self.fd_sets = FdSets()
        self.lab: Lab | None = None  # with --lab
        self.audit: Audit | None = None  # with --audit
        self.jobs = Jobs(lambda name, data: self.emit(name, data))
        self.lost: dict[str, Record] = {}  # objects of which only the record came back
        self.unclaimed: list[tuple[str, int]] = []  # fds that came back without a record, by fd-store name; ours
        self.not_kept = ""  # why the latest change could not be made durable; "": it could
        self.stopping = False
        self._encoded: dict[str, bytes] = {}
        # Set by the daemon: send an event to every negotiated client; end the process soon; run a coroutine as
        # a task; make changes durable, or undo them, and then call back.
        self.emit: Callable[[str, dict[str, Any]], None]
        self.stop: Callable[[], None]
        self.spawn: Callable[[Coroutine[Any, Any, None]], None]
        self.settle: Callable[[list[Change], Callable[[], None]], None]

    def adopt_restored(self, restored: Restored) -> None:
        """Take over what a predecessor left."""
        stores = {record.id: (record, fd) for record, fd in restored.objects if record.qom_type == PRIVATE_STORE}
        for record, fd in restored.objects:
            if record.qom_type != PRIVATE_STORE:
                backend = backend_of(record, fd, self.schema)
                backend.private_record, backend.private_fd = stores.pop(store_id(backend), (None, -1))
                if backend.private_fd >= 0:
                    with contextlib.suppress(OSError):
                        reconcile(backend, self.kernel)
                self.objects.restore([backend])
        self.unclaimed += [(record.fd_name, fd) for record, fd in stores.values()]
        self.counters.restored += len(self.objects)
        self.lost = {record.id: record for record in restored.lost}
        self.unclaimed += restored.unclaimed
        for object_id in self.lost:
            self.objects.lose(object_id)

    async def durable(self) -> None:
        """Wait until all that was changed so far is durable, or undone."""
        if self.custody is not None:
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.settle([], lambda: done.set_result(None))
            await done

    def encoded(self, key: str, make: Callable[[], Any]) -> bytes:
        """The encoded value of `make()`, which never changes while the daemon runs; made at the first call."""
        if key not in self._encoded:
            self._encoded[key] = encode(make())
        return self._encoded[key]

    def describe(self) -> str:
        """What is held, in one line."""
        size = sum(backend.memory_size for backend in self.objects) >> 20
        lost = f", {len(self.lost)} lost" if self.lost else ""
        return f"{len(self.objects)} objects of {size} MiB in all, kernel {self.kernel.name}{lost}"

    def shutdown(self, reason: str) -> None:
        """Announce the end (SHUTDOWN event) and bring it about; objects stay with custody."""
        if not self.stopping:
            self.stopping = True
            self.emit("SHUTDOWN", {"guest": False, "reason": reason})
            self.stop()

    def close(self) -> None:
        """Release every fd that this process holds."""
        close_beside(self.fd_sets.take_all())
        for _, fd in self.unclaimed:
            close_fd(fd)
        for backend in list(self.objects):
            if backend.record is None and not backend.lasting:  # it ends here
                backend.discard(self.kernel, backend.fd)
            backend.close()
        self.kernel.close()


def settled(gmemd: Gmemd, result: Any) -> asyncio.Future[Any]:
    """The value of a result, once the change that it may be is durable; QmpError if it could not be made so.

    What is changed is handed to the next flush here and now, whenever the future, which must be awaited, is awaited.
    """
    done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    if not isinstance(result, Change):
        done.set_result(result)
        return done

    def settle() -> None:
        if result.error is None:
            done.set_result(result.value)
        else:
            done.set_exception(result.error)

    gmemd.settle([result], settle)
    return done


async def completed(gmemd: Gmemd, result: Any) -> Any:
    """The value that a result, whatever it is, comes to in the end, durable; QmpError if it does not."""
    return await settled(gmemd, await result if isinstance(result, CoroutineType) else result)


def recorded(gmemd: Gmemd, backend: HostMemoryBackend, value: Any, *, undo: Step, done: Step | None = None) -> Any:
    """The result of a command that has changed what is written about an object; undone where it cannot be written."""
    if gmemd.custody is None or backend.record is None:
        if done is not None:
            done()
        return value
    before = backend.record

    def take_back() -> asyncio.Future[None] | None:
        backend.record = before
        return undo()

    try:
        backend.record = updated(backend)
        operation = gmemd.custody.update(backend.record)
    except BaseException:
        take_back()
        raise
    return Change(value, operation, undo=take_back, done=done)


def record_of(backend: HostMemoryBackend, kernel: Kernel) -> Record:
    """What the registry is to know of an object."""
    uid, pid = backend.owner
    kind = backend.kind
    if kind == "file" and backend.file_kind:
        kind = backend.file_kind
    elif kind == "file":
        with os_errors(f"cannot look at '{backend.id}'"):
            kind = kernel.identify(backend.fd)
    elif backend.properties.get("hugetlb"):
        kind = "hugetlb-memfd"
    return Record(backend.id, backend.qom_type, dict(backend.properties), kind, backend.memory_size,
                  kernel=kernel.name, owner_uid=uid, owner_pid=pid, created=int(on_the_wall(backend.made)),
                  extra=_extra(backend))


def _extra(backend: HostMemoryBackend) -> dict[str, Any]:
    extra: dict[str, Any] = {"kind": backend.kind, "flags": backend.guest_memfd_flags, "offset": backend.offset,
                             "made": int(backend.made * 1000) / 1000}  # never later than it was
    if backend.visibility is not None:
        extra["visibility"] = [backend.visibility.initial, *backend.visibility.dump()]
    if backend.lease is not None:
        extra["lease"] = backend.lease.dump()
    return extra


def updated(backend: HostMemoryBackend) -> Record:
    """The record of an object whose properties or visibility have changed."""
    record: Record = backend.record.changed(arguments=dict(backend.properties), extra=_extra(backend))
    return record


def store_id(backend: HostMemoryBackend) -> str:
    """The registry's id of the memfd that holds an object's preserved private bytes: no object can have it."""
    return f"{backend.id}[private]"


def store_record(backend: HostMemoryBackend) -> Record:
    """What the registry is to know of that memfd."""
    return Record(store_id(backend), PRIVATE_STORE, {}, "memfd", backend.memory_size)


def backend_of(record: Record, fd: int, schema: Schema) -> HostMemoryBackend:
    """The object that a record describes, as it was; it owns `fd` from now on."""
    defaults = {name: declared.default for name, declared in schema.properties(record.qom_type).items()
                if declared.default is not None}
    backend = BACKENDS[record.qom_type](record.id, {**defaults, **record.arguments, "prealloc-context": ""})  # not kept
    backend.fd = fd
    backend.memory_size = record.size
    backend.kind = record.extra["kind"]
    if backend.kind == "file":
        backend.file_kind, backend.status = record.kind, os.fstat(fd)
    backend.guest_memfd_flags = record.extra["flags"]
    backend.offset = record.extra["offset"]
    if "visibility" in record.extra:
        initial, *changes = record.extra["visibility"]
        backend.visibility = RangeMap(record.size, initial, changes)
    if "lease" in record.extra:
        backend.lease = Lease(*record.extra["lease"])
    backend.foreign = True
    backend.owner = (record.owner_uid, record.owner_pid)
    backend.made = from_record(record.extra.get("made"), record.created)
    backend.record = record
    return backend
