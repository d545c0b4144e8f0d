"""The /objects container of the QOM tree: add, delete, find, list.

Adding takes three steps: `begin` checks everything that needs no system call and takes the id; the backend then creates
its memory; `commit` makes the object visible, or `cancel` frees the id. Follows QEMU's
user_creatable_add_type/user_creatable_del (qmp.md section 8).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from gmemd.errors import QmpError
from gmemd.objects.names import is_uid
from gmemd.qmp.ghashtable import GHashSet

if TYPE_CHECKING:
    from gmemd.backends.base import HostMemoryBackend


class ThreadContext:
    """The host CPUs for threads that preallocate memory: an object that is not memory, and is not kept."""

    qom_type: ClassVar[str] = "thread-context"

    def __init__(self, object_id: str, cpus: list[int]) -> None:
        self.id = object_id
        self.cpus = cpus

    @property
    def path(self) -> str:
        """Its path in the QOM tree."""
        return f"/objects/{self.id}"



_MONITOR = "compat_monitor0"
_TAKEN = frozenset({"type", _MONITOR})

_is_identifier = re.compile(r"[A-Za-z][A-Za-z0-9\-._]*").fullmatch


@cache
def _backends() -> dict[str, type[HostMemoryBackend]]:
    from gmemd.backends.types import BACKENDS  # not at start

    return BACKENDS


class Objects:
    """The live objects by id, and the order in which QOM lists them."""

    def __init__(self, tenant: str | None = None) -> None:
        """`tenant`: in whose room it is; None: in the house."""
        self.tenant = tenant
        self._uid = int(tenant) if tenant is not None and is_uid(tenant) else None  # who alone creates objects here
        self._live: dict[str, HostMemoryBackend] = {}
        self.contexts: dict[str, ThreadContext] = {}
        # The container's hash table of property names; QEMU 11.1 puts its own monitor in first, which shows
        # in the order of everything that comes after it.
        self._slots = GHashSet()
        self._slots.add(_MONITOR)
        self.closed = False  # of a room that was removed: nothing is created any more
        self.version = 0  # changes with the set of live objects
        self._adding: set[str] = set()  # ids that are taken without a live object
        self._barred: dict[str, str] = {}  # those of them that are taken by what is left of an object: the refusal

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[HostMemoryBackend]:
        """Live objects in QOM's listing order."""
        live = self._live
        return iter([live[name] for name in reversed(list(self._slots)) if name in live])

    def listed(self) -> Iterator[HostMemoryBackend | ThreadContext]:
        """All objects in QOM's listing order, memory or not."""
        every: dict[str, Any] = self.contexts | self._live
        return iter([every[name] for name in reversed(list(self._slots)) if name in every])

    @property
    def sums(self) -> dict[str, list[int]]:
        """Number and bytes of the live objects of each type."""
        sizes: dict[str, list[int]] = {qom_type: [] for qom_type in _backends()}
        for backend in self._live.values():
            sizes[backend.qom_type].append(backend.memory_size)
        return {qom_type: [len(each), sum(each)] for qom_type, each in sizes.items()}

    def in_creation_order(self) -> list[HostMemoryBackend]:
        """Live objects, the oldest first."""
        return list(self._live.values())

    def get(self, object_id: str) -> HostMemoryBackend | None:
        """The live object with that id, else None."""
        return self._live.get(object_id)

    def find(self, object_id: str) -> HostMemoryBackend:
        """The live object with that id; QmpError if there is none."""
        backend = self._live.get(object_id)
        if backend is None:
            raise QmpError(f"object '{object_id}' not found")
        return backend

    def begin(self, arguments: dict[str, Any], owner: tuple[int, int],
              find_context: Callable[[str], str], *, dry_run: bool = False) -> HostMemoryBackend:
        """Check complete object-add arguments and, except for a dry run, take the id; then call `commit` or `cancel`.

        `find_context` returns the path of the context that a prealloc-context names.
        """
        backend = self.checked(arguments, owner, find_context)
        self.begin_as(backend, dry_run=dry_run)
        return backend

    def begin_as(self, backend: HostMemoryBackend, *, dry_run: bool = False) -> None:
        """The same for a checked object."""
        self._check_free(backend.id)
        if not dry_run:
            self.take(backend)

    def checked(self, arguments: dict[str, Any], owner: tuple[int, int],
                find_context: Callable[[str], str]) -> HostMemoryBackend:
        """The object for complete object-add arguments, whose id is not taken: call `begin_as`, or to take the place of
        one that is removed then, `take`."""
        object_id = arguments["id"]
        if not _is_identifier(object_id):
            raise QmpError("Parameter 'id' expects an identifier")
        if self.tenant is not None:
            self.check_owner(owner[0])
        properties = arguments.copy()
        del properties["id"], properties["qom-type"]
        backend = _backends()[arguments["qom-type"]](object_id, properties)
        backend.owner = owner
        backend.check(find_context)
        return backend

    def check_owner(self, uid: int) -> None:
        """Refuse that somebody else creates something in the room of a tenant, who would pay for it."""
        if self.closed:
            raise QmpError(f"room '{self.tenant}' was removed")
        if self._uid is not None and self._uid != uid:
            raise QmpError(f"only user {self.tenant} creates objects in its room")

    def take(self, backend: HostMemoryBackend) -> None:
        """Take the id, which is free."""
        backend.home = self
        self._adding.add(backend.id)
        self._slots.add(backend.id)

    def add_context(self, context: ThreadContext) -> None:
        """Make a thread context visible; its id was reserved; QmpError as from `commit`."""
        self._adding.discard(context.id)
        self._check_free(context.id)
        self._adding.add(context.id)
        self.contexts[context.id] = context
        self._slots.add(context.id)

    def remove_context(self, object_id: str) -> list[HostMemoryBackend]:
        """Remove a thread context, also from the objects that name it, which are returned."""
        context = self.contexts.pop(object_id)
        self._slots.discard(object_id, rebuild=False)
        self.release(object_id)
        users = [backend for backend in self if backend.get("prealloc-context") == context.path]
        for backend in users:
            backend.reset("prealloc-context", "")
        return users

    def restore_context(self, context: ThreadContext, users: Iterable[HostMemoryBackend]) -> None:
        """Undo `remove_context`."""
        self._adding.add(context.id)
        self.contexts[context.id] = context
        self._slots.add(context.id)
        for backend in users:
            backend.reset("prealloc-context", context.path)

    def context_cpus(self, backend: HostMemoryBackend) -> list[int] | None:
        """The CPUs for preallocating an object; None: any."""
        context = self.contexts.get(backend.get("prealloc-context").removeprefix("/objects/"))
        return None if context is None else context.cpus

    def _check_free(self, object_id: str) -> None:
        if object_id in self._barred:
            raise QmpError(self._barred[object_id])
        if object_id in self._live or object_id in self._adding or object_id in _TAKEN:
            raise QmpError(f"attempt to add duplicate property '{object_id}' to object (type 'container')")

    def reserve(self, object_id: str) -> None:
        """Take the id of an object that is not memory and lives elsewhere; QmpError if it is taken or malformed."""
        if not _is_identifier(object_id):
            raise QmpError("Parameter 'id' expects an identifier")
        self._check_free(object_id)
        self._adding.add(object_id)

    def release(self, object_id: str) -> None:
        """Free a reserved id."""
        self._adding.discard(object_id)

    def lose(self, object_id: str, *, lost: bool = True) -> None:
        """Block the id of a lost object, or free it."""
        if lost:
            self.bar(object_id, f"object '{object_id}' is lost, only its record came back: object-del frees the id")
        else:
            self.unbar(object_id)

    def is_taken(self, object_id: str) -> bool:
        """Whether something has the id, or is about to."""
        return object_id in self._live or object_id in self._adding

    def taken(self) -> list[str]:
        """All ids that are taken, those of objects first."""
        return [*self._live, *sorted(self._adding)]

    def bar(self, object_id: str, why: str) -> None:
        """Block an id that belongs to what is left of an object; `why` is the refusal."""
        self._adding.add(object_id)
        self._barred[object_id] = why

    def unbar(self, object_id: str) -> None:
        """Free it again."""
        self._adding.discard(object_id)
        self._barred.pop(object_id, None)

    def commit(self, backend: HostMemoryBackend) -> None:
        """Make the object visible; QmpError if what had its id is back, because its deletion was undone."""
        object_id = backend.id
        self._adding.discard(object_id)
        if object_id in self._live or object_id in self._barred:
            self._check_free(object_id)
        self._live[object_id] = backend
        self.version += 1

    def uncommit(self, backend: HostMemoryBackend) -> None:
        """Undo `commit`: the object is invisible, and its id taken until `cancel`."""
        del self._live[backend.id]
        self._adding.add(backend.id)
        self.version += 1

    def cancel(self, backend: HostMemoryBackend) -> None:
        """Undo `begin`, and `commit`: free the id. The memory, if there is any, is left to the caller."""
        if self._live.get(backend.id) is backend:
            self.remove(backend.id)
        self._adding.discard(backend.id)
        if backend.id not in self._live:  # else one that was deleted before is back
            self._slots.discard(backend.id, rebuild=False)

    def remove(self, object_id: str) -> HostMemoryBackend:
        """Remove an existing object; its memory goes to the caller, which closes it or calls `restore`."""
        backend = self._live.pop(object_id)
        self.version += 1
        self._slots.discard(object_id, rebuild=False)
        return backend

    def restore(self, backends: Iterable[HostMemoryBackend]) -> None:
        """Put objects back as they are: after a restart, or because a removal could not be made durable."""
        for backend in backends:
            backend.home = self
            self._slots.add(backend.id)
            self._live[backend.id] = backend
            self.version += 1
