"""What all memory backends share: properties, their checks, NUMA policy, preallocation.

Life of a backend, in QEMU's order (host_memory_backend_* and user_creatable_complete):
  1. `check()`: each property on its own, in the fixed order of the setters.
  2. `allocate(kernel)`: the type's own rules, then the memory itself; sets `fd`, which belongs to the backend.
  3. `finish(kernel)`: policy against host-nodes, binding.
  4. `populate(kernel)`: preallocation; long, may run in a worker thread.
Each step raises QmpError in QEMU's words; `close()` then frees everything.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from gmemd.errors import QmpError, close_fd
from gmemd.kernel.kernel import Kernel
from gmemd.memory.lease import Lease
from gmemd.memory.moves import AWAY, Move
from gmemd.memory.piece import Aside, Piece
from gmemd.memory.ranges import RangeMap
from gmemd.memory.runner import Handover, Runner
from gmemd.memory.tracking import Tracking
from gmemd.posix import boottime
from gmemd.qmp.encode import encode

if TYPE_CHECKING:
    from gmemd.authority.ledger import Charge
    from gmemd.memory.usage import Usage

MAX_NODES = 128  # MAX_NODES of QEMU's include/sysemu/numa.h

# Order in which QOM lists the properties of the base class (the slot order of its hash table).
BASE_ORDER = ("share", "size", "dump", "prealloc-threads", "x-use-canonical-path-for-ramblock-id", "policy",
              "prealloc-context", "prealloc", "reserve", "host-nodes", "merge")

_MEMDEV_MEMBERS = ("share", "reserve", "prealloc", "host-nodes", "size", "merge", "dump", "policy")


@dataclass(eq=False)
class Enforcer:
    """A process whose mapping of an object faults where the object is private; owns `fd`."""

    pid: int
    address: int
    fd: int  # its userfaultfd
    end: Callable[[], None] = lambda: None  # ends the watch for its end


class Home(Protocol):
    """A container of objects."""

    tenant: str | None  # in whose room it is; None: in the house

    def get(self, object_id: str) -> HostMemoryBackend | None:
        """The live object with that id."""


class HostMemoryBackend(Piece):
    """One piece of host memory; owns `fd` from `allocate` until `close`."""

    qom_type: ClassVar[str]
    own_order: ClassVar[tuple[str, ...]] = ()  # own properties in QOM's listing order
    # Properties that cannot change on a live object: name -> the refusal; those of `unseen` whatever the value is.
    fixed: ClassVar[dict[str, str]] = {
        "size": "cannot change property size of {type} ",
        "share": "cannot change property value",
        "reserve": "cannot change property value",
    }
    unseen: ClassVar[frozenset[str]] = frozenset({"size"})
    on_file: ClassVar[bool] = False  # on a disk or a server that may hang: the event loop does nothing with its fd
    can_be_tried: ClassVar[bool] = True  # its memory can be created and freed without a trace

    # The initial state of an object, besides that of a piece: on the class, as there.
    file_kind = ""  # for a file, the result of Kernel.identify off the event loop
    guest_memfd_flags: int | None = None
    owner = (-1, -1)  # uid and pid of the creator
    home: Home | None = None  # where it is, or is about to be
    charge: Charge | None = None  # to an account; None: nobody is limited
    account = ""  # the name of that account; "": it is the owner's own
    huge_page = 0  # bytes of a page of a file on hugetlbfs
    handed_out = 0
    blank = False  # nobody has written to it or sealed it: its descriptor stayed here, no change has claimed it
    foreign = False  # other processes may have had it before this one
    lease: Lease | None = None
    generation = 0  # how often a guest began to run on it
    runner: Runner | None = None  # the process that runs one
    handover: Handover | None = None  # its guest is on its way to another VMM
    enforcers: tuple[Enforcer, ...] = ()  # mappings in which private pages fault; all shared ones are then allocated
    tracking: Tracking | None = None  # of what others write, with their userfaultfds
    fence: dict[str, Any] | None = None  # what keeps it from being written now, with what was stopped for that
    template = ""  # the id of the object whose memory it has; "": it is no clone
    origin = ""  # of a template: what its memory is of, in a client's words
    visibility: RangeMap | None = None  # what is private and what shared; None: it is not a guest_memfd
    aside: Aside | None = None  # the preserved private bytes; None: there are none
    move: Move | None = None  # the latest to or from another gmemd
    measured: tuple[float, Usage] | None = None  # the last measurement, and when it was (monotonic seconds)
    marks: dict[str, int] | None = None  # of the moments at which it was saved while tracked, by snapshot
    claims: tuple[str, ...] = ()  # what the changes that have claimed it do
    shared = False  # the claims are shared: they only read
    waits = False  # its file is being opened and examined, which can take forever
    unwanted = False  # nobody waits for that any more
    lasting = False  # its memory belongs to another gmemd and outlives this process
    _leaving = False  # it was deleted while it was claimed
    _memdev: bytes | None = None

    def __init__(self, object_id: str, properties: dict[str, Any]) -> None:
        self.id = object_id
        self.properties = properties
        self.size: int = properties["size"]  # bytes, as asked
        canonical = properties.get("x-use-canonical-path-for-ramblock-id")  # a later change does not rename it
        self.region_name = f"/objects/{object_id}" if canonical else object_id
        self.made = boottime.now()  # seconds since boot

    @property
    def name(self) -> str:
        tenant = None if self.home is None else self.home.tenant
        return self.id if tenant is None else f"{self.id}@{tenant}"

    @property
    def lives(self) -> bool:
        """Whether it exists: its creation has come so far, and it was not deleted."""
        return self.home is not None and self.home.get(self.id) is self

    @property
    def age(self) -> int:
        """Seconds since it was created."""
        return int(boottime.now() - self.made)

    def copy(self) -> HostMemoryBackend:
        """Another one in the same state, with properties of its own, that borrows the descriptors."""
        other = type(self)(self.id, dict(self.properties))
        for name in getattr(self, "__mypyc_attrs__", None) or vars(self):  # compiled, it has no __dict__
            if name != "properties" and hasattr(self, name):
                setattr(other, name, getattr(self, name))
        return other

    def pieces(self) -> tuple[Piece, ...]:
        """Itself, and what is set aside for it."""
        return (self,) if self.aside is None else (self, self.aside)

    # -- step 1 ----------------------------------------------------------------------------------

    def check(self, find_context: Callable[[str], str]) -> None:
        """Check each property on its own; `find_context` gives the path of the context that prealloc-context names."""
        properties = self.properties
        if properties.get("prealloc-context"):
            properties["prealloc-context"] = find_context(properties["prealloc-context"])
        if properties["prealloc"] and not properties["reserve"]:
            raise QmpError("'prealloc=on' and 'reserve=off' are incompatible")
        nodes = properties["host-nodes"]
        if "hugetlbsize" in properties and not properties["hugetlbsize"]:
            self.check_value("hugetlbsize", 0)
        if nodes:
            self.check_value("host-nodes", nodes)
            properties["host-nodes"] = sorted(set(nodes))
        if not properties["prealloc-threads"]:
            self.check_value("prealloc-threads", 0)
        if not properties["size"]:
            self.check_value("size", 0)

    def check_value(self, name: str, value: Any) -> None:
        """Raise for a value that has the right type but is not allowed."""
        if value == 0 and name in ("prealloc-threads", "size"):
            raise QmpError(f"property '{name}' of {self.qom_type} doesn't take value '0'")
        if name == "host-nodes":
            for node in value:
                if node >= MAX_NODES:
                    raise QmpError(f"Invalid host-nodes value: {node}")
        elif name == "prealloc" and value and not self.properties["reserve"]:
            raise QmpError("'prealloc=on' and 'reserve=off' are incompatible")

    # -- step 2 ----------------------------------------------------------------------------------

    def allocate(self, kernel: Kernel) -> None:
        """Create the memory; `fd`, `kind` and `memory_size` are set afterwards."""
        raise NotImplementedError

    # -- steps 3 and 4 ---------------------------------------------------------------------------

    def finish(self, kernel: Kernel) -> None:
        """Apply the NUMA policy."""
        policy, nodes = self.properties["policy"], self.properties["host-nodes"]
        if policy == "default":
            if nodes:
                raise QmpError("host-nodes must be empty for policy default, or you should explicitly specify"
                               " a policy other than default")
            return
        if not nodes:
            raise QmpError(f"host-nodes must be set for policy {policy}")
        try:
            kernel.set_policy(self.fd, self.memory_size, policy, nodes)
        except OSError as exc:
            raise QmpError(f"cannot bind memory to host NUMA nodes: {os.strerror(exc.errno or 0)}") from exc

    def populate(self, kernel: Kernel, progress: Callable[[int], None] | None = None,
                 cancelled: Callable[[], bool] | None = None) -> None:
        """Allocate every page; blocks. On failure everything that it allocated is freed."""
        try:
            kernel.populate(self.fd, self.offset, self.memory_size, self.properties["prealloc-threads"],
                            policy=self.properties["policy"], nodes=self.properties["host-nodes"],
                            fresh=self.handed_out == 0 and not self.foreign, progress=progress, cancelled=cancelled)
        except OSError as exc:
            raise QmpError("qemu_prealloc_mem: preallocating memory failed: "
                           f"{os.strerror(exc.errno or 0)}") from exc

    def drop(self, enforcer: Enforcer) -> None:
        """Release a cooperating process; when the last copy of its fd is closed, its pages no longer fault."""
        self.enforcers = tuple(one for one in self.enforcers if one is not enforcer)
        enforcer.end()
        close_fd(enforcer.fd)

    def wrote(self, offset: int, size: int) -> None:
        """Tell who tracks it that gmemd itself changes a part."""
        if self.tracking is not None:
            self.tracking.wrote([(offset, size)])

    @property
    def busy(self) -> str:
        """What the change that has claimed it does, or a handover; "": neither."""
        return self.claims[0] if self.claims else self.handover.doing if self.handover else ""

    def check_here(self) -> None:
        """Refuse what another gmemd owns, or may own."""
        move = self.move
        if move is not None and move.state in AWAY:
            way = f"was moved to {move.peer}" if move.state == "moved" else f"comes from {move.peer}"
            raise QmpError(f"object '{self.id}' {way}, which has not confirmed it: see memdev-move-resolve")

    def check_idle(self) -> None:
        """Refuse while a change has claimed it or its guest is on its way, and what is not owned here."""
        if self.move is not None:
            self.check_here()
        if self.claims or self.handover is not None:
            self._check_unclaimed()

    def _check_unclaimed(self) -> None:
        if self.busy:
            raise QmpError(f"object '{self.id}' is busy: {self.busy}")

    def claim(self, doing: str, *, shared: bool = False, away: bool = False) -> None:
        """Keep all other commands from changing it until `unclaim`; `doing`: the reason in their refusal.

        away: even if another gmemd may own it.
        """
        if not away:
            self.check_here()
        if not (shared and self.shared):
            self._check_unclaimed()
        self.claims += (doing,)
        self.shared = shared
        self.blank = False

    def unclaim(self, doing: str) -> list[int]:
        """End a claim; the descriptors to close if the object was deleted meanwhile."""
        claims = list(self.claims)
        if doing in claims:
            claims.remove(doing)
        self.claims = tuple(claims)
        return self.detach() if self._leaving and not claims else []

    def detach(self) -> list[int]:
        """Give the descriptors away, to be closed; none while it is claimed: then `unclaim` returns them."""
        if self.lease is not None:
            self.lease.end()
        if self.runner is not None:
            self.runner.end()
        if self.handover is not None:
            self.handover.end()
        if self.claims:
            self._leaving = True
            return []
        for enforcer in self.enforcers:
            self.drop(enforcer)
        if self.tracking is not None:
            self.tracking.close()
            self.tracking = None
        fds = [self.fd] if self.fd >= 0 else []
        self.fd = -1
        if self.aside is not None:
            fds.append(self.aside.fd)
            self.aside = None
        return fds

    def close(self) -> None:
        """Free the memory, as far as this process holds it; may take long."""
        for fd in self.detach():
            close_fd(fd)

    def discard(self, kernel: Kernel, fd: int) -> None:
        """Discard what would outlive the object, if requested; call it when the deletion is final. May take long.

        `fd` is its former fd, not closed yet.
        """

    def abandon(self) -> None:
        """Close an object that was never completed, and remove what it has left elsewhere; may take long."""
        self.close()

    # -- as a QOM object -------------------------------------------------------------------------

    @classmethod
    def property_names(cls) -> tuple[str, ...]:
        """Names of all properties but `type`, in QOM's order."""
        return BASE_ORDER + cls.own_order

    def get(self, name: str) -> Any:
        """A property's value as returned by qom-get."""
        if name in ("hugetlbsize", "prealloc-context"):
            return self.properties.get(name) or (0 if name == "hugetlbsize" else "")
        return self.properties[name]

    def set(self, name: str, value: Any) -> None:
        """Change the stored value of a property of a live object, after `refuse_set` and the type check."""
        self.check_value(name, value)
        if name == "prealloc" and not value:
            return  # once true, it stays true
        if name == "host-nodes":  # QEMU adds to the set, and never removes a node
            value = sorted({*self.properties[name], *value})
        self.reset(name, value)

    def reset(self, name: str, value: Any) -> None:
        """Store a value that was checked before."""
        self.properties[name] = value
        self._memdev = None

    def refuse_set(self, name: str, *, seen: bool) -> None:
        """Raise for a property that cannot change; called before (`seen` false) and after the value check."""
        text = self.fixed.get(name)
        if text is not None and (seen or name in self.unseen):
            raise QmpError(text.format(type=self.qom_type, name=name))

    @property
    def memdev(self) -> bytes:
        """The entry of query-memdev, encoded."""
        if self._memdev is None:
            self._memdev = self.memdev_as(self.id)
        return self._memdev

    def memdev_as(self, name: str) -> bytes:
        """The same with another name."""
        entry = {member: self.properties[member] for member in _MEMDEV_MEMBERS}
        entry["id"] = name
        return encode(entry)

    def round_up(self, page: int) -> int:
        """`size` rounded up to pages; wraps to 0 as 64-bit arithmetic does."""
        return (self.size + page - 1) // page * page % (1 << 64)

    def check_backing(self, actual: int, offset: int = 0) -> None:
        """Refuse a file of `actual` bytes that is shorter than the rounded size plus `offset` (in 64 bits)."""
        if actual < (self.memory_size + offset) % (1 << 64):
            raise QmpError(f"{self.region_name} backing store size {actual:#x} is too small for 'size' option "
                           f"{self.memory_size:#x} plus 'offset' option {offset:#x}")

    def check_mappable(self, kernel: Kernel, *, align: int = 0, **how: Any) -> None:
        """Refuse what mmap(2) refuses, without touching a page; `align` bytes as in `try_reserve`."""
        try:
            if align:
                self.try_reserve(kernel, align)
            kernel.try_map(self.fd, self.memory_size, reserve=self.properties["reserve"], **how)
        except OSError as exc:
            raise QmpError("unable to map backing store for guest RAM: "
                           f"{os.strerror(exc.errno or 0)}") from exc

    def try_reserve(self, kernel: Kernel, align: int) -> None:
        """Find address space for the memory and its alignment, as QEMU does before it maps; the sum may wrap."""
        kernel.try_map(None, (self.memory_size + align) % (1 << 64), reserve=False, writable=False, shared=False)
