"""What a command sees: the parts of the daemon (`Gmemd`) and the client (`Caller`).

A command that only reads is a function `name(gmemd, caller, arguments)` with complete, checked arguments; one that does
more has a fourth parameter, its `Change`. It returns
- a JSON value, or `bytes` that are JSON already;
- `WithFds`, a value whose reply carries file descriptors;
- a coroutine that returns one of these, when the work is long.
It raises QmpError to refuse.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from gmemd.changes.jobs import Jobs
from gmemd.changes.settling import Settler
from gmemd.changes.threads import close_beside
from gmemd.commands.outlook import Manager, Outlook, Unmanaged
from gmemd.commands.shelf import Shelves
from gmemd.errors import close_fd
from gmemd.objects.container import Objects
from gmemd.objects.conversion import reconcile
from gmemd.objects.fds import FdSets, NamedFds
from gmemd.objects.qom import Tree
from gmemd.objects.records import TOMBSTONE, move_of, objects_of, settle_in
from gmemd.observe.counters import Counters
from gmemd.persist.nobody import AnyCustody, Nobody
from gmemd.persist.record import Record
from gmemd.qmp.encode import encode
from gmemd.qmp.session import Session
from gmemd.schema.validate import Command, Schema

if TYPE_CHECKING:
    from gmemd.authority.rights import Rights
    from gmemd.kernel.kernel import Kernel
    from gmemd.lab import Lab
    from gmemd.observe.audit import Audit
    from gmemd.persist.restore import Restored


Function = Callable[..., Any]  # of a command

EVENTS_KEPT = 200  # the latest, for later viewers


class Caller(Protocol):
    """The monitor that a command came from."""

    session: Session
    uid: int
    pid: int
    rights: Rights
    usable: Mapping[str, tuple[Command, Function]]  # the commands it may use (Dispatcher.usable)
    named_fds: NamedFds  # its own; closed when it disconnects and its running command has ended

    def is_gone(self) -> bool:
        """Whether nobody will read the answers any more."""
        ...

    def take_fd(self) -> int:
        """Give away the first fd received by SCM_RIGHTS and close the rest of its batch; QmpError if there is none."""
        ...


class Host(Protocol):
    """What runs commands: the daemon."""

    def emit(self, name: str, data: dict[str, Any]) -> None:
        """Send an event to every negotiated client."""
        ...

    def stop(self) -> None:
        """End the process soon."""
        ...

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine as a task."""
        ...


class Gmemd:
    """The parts of the daemon that commands work on."""

    def __init__(self, *, schema: Schema, kernel: Kernel, version: dict[str, Any], host: Host, name: str | None = None,
                 uuid: str | None = None, custody: AnyCustody | None = None, manager: Manager | None = None,
                 lab: Lab | None = None, audit: Audit | None = None, snapshots: str = "") -> None:
        """Without `custody` nothing is kept; `lab` and `audit` exist only on request.

        `snapshots` is the directory for them; "": clients have to pass one.
        """
        manager = manager or Unmanaged()
        self.schema = schema
        self.kernel = kernel
        self.version = version
        self.name = name
        self.uuid = uuid
        self.custody: AnyCustody = Nobody() if custody is None else custody
        self.lab = lab
        self.audit = audit
        self.emit = host.emit
        self.stop = host.stop
        self.spawn = host.spawn
        self.objects = Objects()
        self.tree = Tree(schema, self.objects)
        self.settler = Settler(self.objects, kernel, self.custody, manager.status_changed)
        self.settle = self.settler.settle
        self.outlook = Outlook(self.settler, manager, host.spawn, self.kept)
        self.counters = Counters(schema.commands, schema.reading)
        self.events: deque[tuple[float, str, dict[str, Any]]] = deque(maxlen=EVENTS_KEPT)  # when (seconds), name, data
        self.fd_sets = FdSets()
        self.jobs = Jobs(host.emit)
        self.snapshots = Shelves(snapshots)
        self.lost: dict[str, Record] = {}  # objects whose record came back, but not their memory
        self.gone: dict[str, Record] = {}  # what is left of objects that were moved to another gmemd
        self.unclaimed: list[tuple[str, int]] = []  # fds that came back without a record, by fd-store name; ours
        self.stopping = False
        self._encoded: dict[str, bytes] = {}

    def adopt_restored(self, restored: Restored) -> None:
        """Take over what a predecessor left."""
        for record in [record for record, _ in restored.objects if record.qom_type == TOMBSTONE]:
            self.bury(record)
        backends, asides = objects_of([entry for entry in restored.objects if entry[0].qom_type != TOMBSTONE],
                                      self.schema)
        for backend in backends:
            if backend.aside is not None:
                with contextlib.suppress(OSError):
                    reconcile(backend, self.kernel)
        if moved := settle_in(backends, self.kernel):
            self.custody.rewrite(moved)
        self.objects.restore(backends)
        self.unclaimed += asides + restored.unclaimed
        self.counters.restored += len(self.objects)
        self.lost = {record.id: record for record in restored.lost}
        for object_id in self.lost:
            self.objects.lose(object_id)

    def bury(self, record: Record) -> None:
        """Keep the id of an object that was moved away from being used: the tombstone says where it is."""
        self.gone[record.id] = record
        move = move_of(record)
        assert move is not None
        self.objects.bar(record.id, f"object '{record.id}' was moved to {move.peer}: object-del forgets that and frees"
                                    " the id")

    def unbury(self, object_id: str) -> None:
        """Remove a tombstone."""
        del self.gone[object_id]
        self.objects.unbar(object_id)

    def kept(self) -> Iterator[tuple[str, int]]:
        """Everything that the service manager is to hold, by its name in the store; the fds are borrowed."""
        for backend in list(self.objects):
            for piece in backend.pieces():
                if piece.record is not None and piece.record.fd_name and piece.fd >= 0:
                    yield piece.record.fd_name, piece.fd
        yield from list(self.unclaimed)

    def encoded(self, key: str, make: Callable[[], Any]) -> bytes:
        """The encoded value of `make()`, which never changes while the daemon runs; cached."""
        if key not in self._encoded:
            self._encoded[key] = encode(make())
        return self._encoded[key]

    def describe(self) -> str:
        """A summary of the objects in one line."""
        size = sum(backend.memory_size for backend in self.objects) >> 20
        lost = f", {len(self.lost)} lost" if self.lost else ""
        return f"{len(self.objects)} objects of {size} MiB in total, kernel {self.kernel.name}{lost}"

    def shutdown(self, reason: str) -> None:
        """Announce the end (SHUTDOWN event) and stop; objects stay with custody."""
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
