"""What a command sees: the parts of the daemon (`Gmemd`) and the client (`Caller`).

A command that only reads is a function `name(gmemd, caller, arguments)` with complete, checked arguments; one that does
more has a fourth parameter, its `Change`. It returns
- a JSON value, or `bytes` that are JSON already;
- `WithFds`, a value whose reply carries file descriptors;
- a coroutine that returns one of these, when the work is long.
It raises QmpError to refuse.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from copy import copy
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from gmemd.changes.jobs import Jobs
from gmemd.changes.settling import Settler
from gmemd.changes.threads import close_beside
from gmemd.errors import close_fd
from gmemd.objects.container import Objects
from gmemd.objects.fds import FdSets, NamedFds
from gmemd.objects.names import IN_THE_HOUSE, at_home, outside
from gmemd.observe.counters import Counters
from gmemd.persist.nobody import AnyCustody, Nobody
from gmemd.qmp.encode import encode
from gmemd.qmp.session import Session
from gmemd.schema.validate import Command, Schema

if TYPE_CHECKING:
    import socket

    from gmemd.authority.ledger import Account, Budget, Ledger
    from gmemd.authority.rights import Rights
    from gmemd.backends.base import HostMemoryBackend
    from gmemd.commands.outlook import Manager, Outlook
    from gmemd.commands.shelf import Shelves
    from gmemd.kernel.kernel import Kernel
    from gmemd.lab import Lab
    from gmemd.objects.qom import Tree
    from gmemd.objects.rooms import MadeRoom
    from gmemd.observe.audit import Audit
    from gmemd.persist.record import Record
    from gmemd.snapshots.catalogue import Entry


Function = Callable[..., Any]  # of a command

EVENTS_KEPT = 200  # the latest, for later viewers


def _nothing() -> None:
    pass


class _Parts:
    """What a room creates when it is first needed, the same for all its copies."""

    __slots__ = ("snapshots", "tree")

    def __init__(self, tree: Tree | None = None, snapshots: Shelves | None = None) -> None:
        self.tree = tree
        self.snapshots = snapshots


def function_in(modules: Sequence[ModuleType], name: str) -> Function | None:
    """The function of a command in these modules, of which later ones override earlier ones."""
    wanted = name.replace("-", "_")
    return next((vars(module)[wanted] for module in reversed(modules) if wanted in vars(module)), None)


class Caller(Protocol):
    """The monitor that a command came from."""

    session: Session
    room: Gmemd  # what there is for it: the house, or that of a tenant
    uid: int
    pid: int
    budget: Budget | None  # what it may have; None: it is not limited
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
        """Send an event to every negotiated client in the house."""
        ...

    def emit_in(self, room: Gmemd, name: str, data: dict[str, Any]) -> None:
        """Send an event to every negotiated client in the room of a tenant."""
        ...

    def rights_in(self, made: MadeRoom) -> Rights:
        """What the clients of a made room may; QmpError if the policy lets its namespace have nothing."""
        ...

    def open_room(self, room: Gmemd, listener: socket.socket | None) -> None:
        """Let clients into a made room, by its socket, which is given away; None: it has none."""
        ...

    def close_room(self, room: Gmemd) -> None:
        """Let nobody in any more, and remove the socket."""
        ...

    def clear_room(self, room: Gmemd) -> None:
        """Disconnect all who are in a room."""
        ...

    def clients_in(self, room: Gmemd) -> int:
        """How many clients are in a room."""
        ...

    def stop(self) -> None:
        """End the process soon."""
        ...

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine as a task."""
        ...


class Gmemd:
    """The parts of the daemon that commands work on: the house, or a room: of a tenant, or a made one.

    In a room there is only what was created there: nothing that others have can be found there, by any command. The
    house has what is in no room, and shows those who are in it also what is in the rooms, by names of its own: ID@ROOM.
    """

    def __init__(self, *, schema: Schema, kernel: Kernel, version: dict[str, Any], host: Host, name: str | None = None,
                 uuid: str | None = None, custody: AnyCustody | None = None, manager: Manager | None = None,
                 lab: Lab | None = None, audit: Audit | None = None, snapshots: str = "",
                 ledger: Ledger | None = None) -> None:
        """Without `custody` nothing is kept, without `ledger` nobody is limited; `lab`, `audit` exist on request.

        `snapshots` is the directory for them; "": clients have to pass one.
        """
        self.schema = schema
        self.kernel = kernel
        self.version = version
        self.name = name
        self.uuid = uuid
        self.custody: AnyCustody = Nobody() if custody is None else custody
        self.lab = lab
        self.audit = audit
        self.host = host
        self.stop = host.stop
        self.spawn = host.spawn
        self.settler = Settler(kernel, self.custody, _nothing if manager is None else manager.status_changed)
        self.settle = self.settler.settle
        self._manager = manager
        self._outlook: Outlook | None = None  # in the house
        self.counters = Counters(schema.commands, schema.reading)
        self.unclaimed: list[tuple[str, int]] = []  # fds that came back without a record, by fd-store name; ours
        self.stopping = False  # said in the house
        self.ledger = ledger
        self._encoded: dict[str, bytes] = {}
        self.house = self
        self.rooms: dict[str, Gmemd] = {}  # of tenants, by uid, and made ones, by name; in the house
        self.tenant: str | None = None  # which of them it is; None: it is the house
        self.rooms_coming: set[str] = set()  # names of made rooms that are being opened; in the house
        self.made: MadeRoom | None = None  # what it was made with, if it was made
        self.account: Account | None = None  # to which everything in it is charged, if it was made
        self.sees_all = True  # names are those of the house
        self._furnish(snapshots)

    def _furnish(self, snapshots: str) -> None:
        """Create what is a room's own."""
        self.objects = Objects(self.tenant)
        self._parts = _Parts()
        self.events: deque[tuple[float, str, dict[str, Any]]] = deque(maxlen=EVENTS_KEPT)  # when (seconds), name, data
        self.fd_sets: FdSets = FdSets() if self.tenant is None else FdSets(self.house.fd_sets.share.pool, room=True)
        self.jobs = Jobs(self.emit)
        self.snapshots_path = snapshots
        self.lost: dict[str, Record] = {}  # objects whose record came back, but not their memory
        self.gone: dict[str, Record] = {}  # what is left of objects that were moved to another gmemd

    # -- parts that are created when they are first needed: not at start -------------------------

    @property
    def outlook(self) -> Outlook:
        """What is known about the service manager."""
        house = self.house
        if house._outlook is None:
            from gmemd.commands.outlook import Outlook, Unmanaged

            house._outlook = Outlook(house.settler, house._manager or Unmanaged(), house.spawn, house.kept)
        return house._outlook

    @property
    def tree(self) -> Tree:
        """The QOM tree."""
        parts = self._parts
        if parts.tree is None:
            from gmemd.objects.qom import Tree

            parts.tree = Tree(self.schema, self.objects)
        return parts.tree

    @tree.setter
    def tree(self, tree: Tree) -> None:
        self._parts = _Parts(tree, self.snapshots)

    def find_context(self, path: str) -> str:
        """The path of the thread context that a prealloc-context names; QmpError if there is none."""
        return self.tree.find_context(path)

    @property
    def snapshots(self) -> Shelves:
        """The directories of snapshots."""
        parts = self._parts
        if parts.snapshots is None:
            from gmemd.commands.shelf import Shelves

            parts.snapshots = Shelves(self.snapshots_path)
        return parts.snapshots

    @snapshots.setter
    def snapshots(self, snapshots: Shelves) -> None:
        self._parts = _Parts(self.tree, snapshots)

    # -- rooms -----------------------------------------------------------------------------------

    def room_of(self, tenant: str | None) -> Gmemd:
        """The room with this name, created when it is first needed; None: the house."""
        if tenant is None:
            return self
        if tenant not in self.rooms:
            room = copy(self)
            room.tenant, room.sees_all, room.rooms, room.unclaimed = tenant, False, {}, []
            room._furnish(f"{self.snapshots_path}/@{tenant}" if self.snapshots_path else "")
            self.rooms[tenant], self.tree.rooms[tenant] = room, room.objects
        return self.rooms[tenant]

    def seen_rooms(self) -> list[Gmemd]:
        """Itself and, in the house, the rooms, with the names of the house."""
        return [self, *(room.from_outside() for room in self.rooms.values())]

    def from_outside(self) -> Gmemd:
        """A room as those in the house see it."""
        room = copy(self)
        room.sees_all = True
        if room.made is not None:
            room.snapshots = room.house.snapshots
        return room

    def seen(self) -> list[HostMemoryBackend]:
        """The objects here and, in the house, in the rooms, in QOM's order in each."""
        return [*self.objects, *(backend for room in self.rooms.values() for backend in room.objects)]

    def by_age(self) -> list[HostMemoryBackend]:
        """The same, the oldest first in each."""
        return [*self.objects.in_creation_order(),
                *(backend for room in self.rooms.values() for backend in room.objects.in_creation_order())]

    def sums(self) -> dict[str, tuple[int, int]]:
        """Number and bytes of the same, by type."""
        every = [room.objects.sums for room in (self, *self.rooms.values())]
        return {kind: (sum([sums[kind][0] for sums in every]), sum([sums[kind][1] for sums in every]))
                for kind in every[0]}

    def look_up(self, name: str) -> HostMemoryBackend | None:
        """The one that is called that here."""
        object_id, tenant = at_home(name) if self.rooms else (name, None)
        room = self if tenant is None else self.rooms.get(tenant)
        return None if room is None else room.objects.get(object_id)

    def known_snapshots(self) -> list[Entry]:
        """The snapshots in the directories of the same rooms, when they were last looked at."""
        return [entry for room in (self, *self.rooms.values()) for entry in room.snapshots.known.values()]

    def of(self, backend: HostMemoryBackend) -> Gmemd:
        """Where a seen object is, as it is seen from here."""
        tenant = None if backend.home is None or backend.home is self.objects else backend.home.tenant
        return self if tenant is None else self.rooms[tenant].from_outside()

    def called(self, backend: HostMemoryBackend) -> str:
        """The name of an object for those who are here."""
        return backend.name if self.sees_all else backend.id

    def named(self, own: str) -> str:
        """The same for the id of anything that is here."""
        if own.startswith(IN_THE_HOUSE):
            return own.removeprefix(IN_THE_HOUSE)
        return own if self.tenant is None or not self.sees_all else outside(own, self.tenant)

    def emit(self, name: str, data: dict[str, Any]) -> None:
        """Send an event to the clients here, and to those in the house."""
        if self.tenant is not None:
            if (room := self.house.rooms.get(self.tenant)) is not None:  # else it was removed
                self.host.emit_in(room, name, data)
            data = {member: outside(value, self.tenant) if member in ("id", "ids") else value
                    for member, value in data.items()}
        self.host.emit(name, data)

    # -- start and end ---------------------------------------------------------------------------

    def kept(self) -> Iterator[tuple[str, int]]:
        """Everything that the service manager is to hold, by its name in the store; the fds are borrowed."""
        for backend in self.house.seen():
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
        backends = self.seen()
        size = sum(backend.memory_size for backend in backends) >> 20
        count = sum(len(room.lost) for room in self.seen_rooms())
        lost = f", {count} lost" if count else ""
        return f"{len(backends)} objects of {size} MiB in total, kernel {self.kernel.name}{lost}"

    def shutdown(self, reason: str) -> None:
        """Announce the end (SHUTDOWN event) and stop; objects stay with custody."""
        house = self.house
        if not house.stopping:
            house.stopping = True
            data = {"guest": False, "reason": reason}
            for room in house.rooms.values():
                self.host.emit_in(room, "SHUTDOWN", data)
            house.emit("SHUTDOWN", data)
            self.stop()

    def close(self) -> None:
        """Release every fd that this process holds."""
        for room in (self, *self.rooms.values()):
            close_beside(room.fd_sets.take_all())
        for _, fd in self.unclaimed:
            close_fd(fd)
        for backend in self.seen():
            if backend.record is None and not backend.lasting:  # it ends here
                backend.discard(self.kernel, backend.fd)
            backend.close()
        self.kernel.close()
