"""The directories of snapshots: the daemon's own, whose contents are known ahead, and those that clients pass.

What a snapshot is used for is noted as soon as the command is checked, so of two commands that meet one is refused.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from gmemd.changes.threads import beside, in_thread
from gmemd.errors import QmpError, close_fd, os_errors
from gmemd.posix.private import exposed
from gmemd.snapshots import catalogue, folder
from gmemd.snapshots.catalogue import Entry

if TYPE_CHECKING:
    from gmemd.backends.base import HostMemoryBackend
    from gmemd.changes.change import Change

Use = tuple[tuple[int, int], str]  # a directory (device and inode), and a name in it


class Shelf:
    """One open directory; owns `fd`. -1: it does not exist yet, and is not to be created."""

    def __init__(self, fd: int, key: tuple[int, int] = (0, 0)) -> None:
        self.fd = fd
        self.key = key  # device and inode
        self.owner = -1  # the user to whom what is made there is given; -1: it stays the daemon's
        self.entries: dict[str, Entry] = {}  # when it was opened, or looked at again

    def find(self, name: str) -> Entry:
        """The snapshot with that name; QmpError if there is none."""
        folder.check_name(name)
        if name not in self.entries:
            raise QmpError(f"snapshot '{name}' not found")
        return self.entries[name]

    def in_order(self) -> list[str]:
        """All names, the oldest snapshot first; those that cannot be used at the end."""
        def key(entry: Entry) -> tuple[bool, str, int]:
            return bool(entry.problem), entry.manifest.get("created", ""), entry.stamp[1]

        return [entry.name for entry in sorted(self.entries.values(), key=key)]

    def usable(self, name: str) -> Entry:
        """The same, of one that can be read; QmpError says why it cannot."""
        entry = self.find(name)
        if entry.problem:
            raise QmpError(entry.problem)
        return entry

    def children(self, name: str) -> list[str]:
        """The deltas that need this one."""
        mine = self.entries[name].manifest.get("id")
        return sorted(entry.name for entry in self.entries.values()
                      if mine is not None and _is_delta(entry) and entry.manifest["parent"]["id"] == mine)

    def needed(self, name: str) -> str | None:
        """The name of the snapshot without which this one is not whole, None if it needs none; QmpError: it is missing.
        """
        entry = self.entries[name]
        if not _is_delta(entry):
            return None
        parent = entry.manifest["parent"]
        for other in self.entries.values():
            if other.manifest.get("id") == parent["id"]:
                return other.name
        raise QmpError(f"snapshot '{name}' cannot be used: '{parent['name']}', from which it differs, is missing")

    def close(self) -> asyncio.Future[None] | None:
        fd, self.fd = self.fd, -1
        return beside(lambda: close_fd(fd)) if fd >= 0 else None


class Shelves:
    """What the daemon knows of snapshots. `path`: its own directory, created when it is first needed; "": none."""

    def __init__(self, path: str = "") -> None:
        self.path = path
        self.known: dict[str, Entry] = {}  # in its own directory, when it was last looked at
        self._counted: dict[str, Entry] = {}  # what the counts are of
        self._counts: Counter[str] = Counter()  # checkpoints by object
        self.rate = 0.0  # bytes that the last job saved in a second; 0: there was none
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by object
        self._uses: dict[Use, list[tuple[str, bool]]] = {}
        self._key = (-1, -1)  # of its own directory, once it is known

    def checkpoints(self, object_id: str) -> int:
        """How many checkpoints of an object are in its own directory."""
        if self._counted is not self.known:
            self._counted = self.known
            self._counts = Counter(entry.manifest["object"]["id"] for entry in self.known.values()
                                   if "device-state" in entry.manifest)
        return self._counts.get(object_id, 0)

    def holds(self, what: str) -> int:
        """For the account of those whose own directory it is: what its snapshots take."""
        return sum([entry.bytes for entry in self.known.values()]) if what == "snapshot-bytes" else 0

    async def load(self) -> None:
        """Look at its own directory after the start, and free what a predecessor has left there."""
        with suppress(QmpError):
            shelf = await self.open(create=False)
            try:
                if shelf.fd >= 0:
                    await in_thread(_sweep, shelf.fd)
            finally:
                shelf.close()

    async def open(self, passed: int = -1, uid: int = -1, *, create: bool) -> Shelf:
        """Its own directory, or `passed`, which is used up, of a client of that uid; with what is in it now."""
        shelf: Shelf
        if passed >= 0:
            shelf = await in_thread(_opened, passed, uid)
        elif not self.path:
            raise QmpError("this gmemd has no directory for snapshots: pass one by 'fdname'")
        else:
            shelf = await in_thread(_own, self.path, create)
            self._key = shelf.key if shelf.fd >= 0 else self._key
        try:
            if create and passed < 0:
                await in_thread(_sweep, shelf.fd)
            await self.look(shelf)
        except BaseException:
            shelf.close()
            raise
        return shelf

    async def made(self, shelf: Shelf, name: str) -> None:
        """A snapshot was made or replaced: give it to the directory's owner, and look."""
        if shelf.owner >= 0:
            await in_thread(_give, shelf.fd, name, shelf.owner)
        await self.look(shelf)

    async def look(self, shelf: Shelf) -> None:
        """Find out what is in a directory now."""
        own = shelf.key == self._key or shelf.fd < 0
        if shelf.fd >= 0:
            shelf.entries = await in_thread(_scan, shelf.fd, self.known if own else {})
        if own:
            self.known = shelf.entries

    def use(self, change: Change, shelf: Shelf, name: str, doing: str, *, shared: bool = False) -> None:
        """Keep others from changing a snapshot, or if not `shared` from using it, until the change has ended.

        QmpError says what it is used for already.
        """
        uses = self._uses.setdefault((shelf.key, name), [])
        for other, was_shared in uses:
            if not (shared and was_shared):
                raise QmpError(f"snapshot '{name}' is busy: {other}")
        mine = (doing, shared)
        uses.append(mine)
        end = partial(self._end, (shelf.key, name), mine)
        change.undo(end)
        change.done(end)

    def mark(self, backend: HostMemoryBackend, uuid: str) -> int | None:
        """The mark of the moment at which an object was saved as that snapshot, if it was being tracked."""
        return None if backend.marks is None else backend.marks.get(uuid)

    def note_mark(self, backend: HostMemoryBackend, uuid: str, mark: int | None) -> None:
        """Remember it; None: it was not tracked."""
        if mark is not None:
            backend.marks = {**(backend.marks or {}), uuid: mark}

    @asynccontextmanager
    async def turn(self, object_id: str) -> AsyncIterator[None]:
        """Wait until nobody else saves that object: only one can keep writers away."""
        lock = self._turns.setdefault(object_id, asyncio.Lock())
        async with lock:
            yield

    def taken(self, shelf: Shelf, name: str) -> bool:
        """Whether a name is one of a snapshot that is there, or is being made."""
        return name in shelf.entries or bool(self._uses.get((shelf.key, name)))

    def _end(self, use: Use, mine: tuple[str, bool]) -> None:
        self._uses[use].remove(mine)
        if not self._uses[use]:
            del self._uses[use]


def _is_delta(entry: Entry) -> bool:
    return any(part["stored"] == "delta" for part in entry.manifest.get("parts", {}).values())


def _own(path: str, create: bool) -> Shelf:
    place = exposed(path)
    if place:
        raise QmpError(f"'{place}' can be written by others, who could replace the snapshots in '{path}': remove that"
                       " permission (chmod go-w), or choose another --snapshots")
    with os_errors(f"cannot open the directory of snapshots, '{path}'"):
        if create:
            os.makedirs(path, mode=0o700, exist_ok=True)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            if create:
                raise
            return Shelf(-1)
        return _shelf(fd)


def _opened(fd: int, uid: int) -> Shelf:
    """The shelf for a client's descriptor: of a directory that is the client's own, so it gets no right from us."""
    try:
        with os_errors("cannot open the directory"):
            status = os.fstat(fd)
            if not stat.S_ISDIR(status.st_mode):
                raise QmpError("the descriptor is not that of a directory")
            if uid not in (0, status.st_uid):
                raise QmpError(f"the directory belongs to user {status.st_uid}, and the client is user {uid}")
            shelf = _shelf(os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd))
            shelf.owner = status.st_uid if os.geteuid() == 0 and status.st_uid else -1
            return shelf
    finally:
        close_fd(fd)


def _shelf(fd: int) -> Shelf:
    status = os.fstat(fd)
    return Shelf(fd, (status.st_dev, status.st_ino))


def _scan(fd: int, known: dict[str, Entry]) -> dict[str, Entry]:
    with os_errors("cannot list the snapshots"):
        return catalogue.scan(fd, known)


def _give(directory: int, name: str, uid: int) -> None:
    """Give a snapshot that root has made to another user, unless that one has put something else in its place."""
    with os_errors(f"cannot give snapshot '{name}' to user {uid}"):
        fd = folder.open_folder(directory, name)
        try:
            if os.fstat(fd).st_uid == 0:
                for file in os.listdir(fd):
                    os.chown(file, uid, -1, dir_fd=fd, follow_symlinks=False)
                os.fchown(fd, uid, -1)
        finally:
            close_fd(fd)


def _sweep(fd: int) -> None:
    with os_errors("cannot free what unfinished work has left"):
        folder.sweep(fd)


