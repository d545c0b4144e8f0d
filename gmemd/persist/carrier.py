"""Keep the registry's copy in the service manager's store up to date."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from typing import Protocol

from gmemd.errors import close_fd
from gmemd.persist.batch import Batch
from gmemd.persist.carried import PREFIX, ROOM, number_of, sealed, written
from gmemd.persist.fdstore import FdStore, seals_of
from gmemd.persist.registry import Registry
from gmemd.persist.waits import Flush
from gmemd.posix.private import make_private

Entries = Callable[[], Iterable[tuple[str, int]]]  # everything that the manager is to hold, with borrowed fds


class Sender(Protocol):
    """What brings descriptors to the manager: Delivery."""

    def store(self, name: str, fd: int) -> Flush:
        """Send one, once the manager's queue has room."""
        ...

    def owe(self, names: Collection[str]) -> None:
        """Have these leave the store with the next batch."""
        ...


class Carrier:
    """The copies in the store: the newest one, open, and names of older ones that are about to leave."""

    def __init__(self, registry: Registry, store: FdStore, sender: Sender, *, wanted: bool, boot: str) -> None:
        """wanted: there shall be a copy. Otherwise those of a predecessor are dropped. boot: this one's id."""
        self._registry = registry
        self._store = store
        self._sender = sender
        self._wanted = wanted
        self._boot = boot
        self.asked: Entries | None = None  # the next flush is to store a copy
        self._number = 0  # of the newest copy
        self._fd = -1  # its fd, which is ours
        self._old: list[str] = []
        self._changes = -1  # the registry's count when it was written; -1: it was not
        store.set_aside = ROOM if wanted else 0

    @property
    def due(self) -> int:
        """A number that stays the same while nothing changes; 0: the copy is up to date, or not wanted."""
        return 0 if not self._wanted or self._registry.changes == self._changes else self._registry.changes + 1

    def ask(self, entries: Entries) -> None:
        """Have the next flush store a new copy, if one is due."""
        if self.due:
            self.asked = entries

    @property
    def stored(self) -> bool:
        """Whether the manager has a copy of this daemon's."""
        return self._fd >= 0

    def take_over(self, copies: list[tuple[str, int]]) -> list[tuple[str, int]]:
        """Take a predecessor's copies, and their fds; those that are to be dropped are given back."""
        if not self._wanted:
            return copies
        for name, fd in copies:
            os.close(fd)
            self._number = max(self._number, number_of(name))
            self._old.append(name)
            self._store.set_aside = max(0, self._store.set_aside - 1)
        return []

    def entries(self) -> Iterable[tuple[str, int]]:
        """The newest copy, as one of what the manager is to hold."""
        if self._fd >= 0:
            yield f"{PREFIX}{self._number}", self._fd

    def renew(self, batch: Batch) -> Flush:
        """Store a new copy if asked, with a batch, and owe the removal of the older ones. OSError or NotWritten."""
        entries, self.asked = self.asked, None
        if entries is None:
            return
        changes, name = self._registry.changes, f"{PREFIX}{self._number + 1}"
        self._old += [name for name, _ in self.entries()]
        if self._store.crowded([name]):  # the next one will be stored, if there is an old one to leave
            self.close()
        else:
            seals = {name: seals_of(fd) for name, fd in entries()}
            fd = sealed(self._written(seals))
            self.close()
            self._number, self._fd = self._number + 1, fd
            self._store.account(name)
            batch.sent.append(name)
            yield from self._sender.store(name, fd)
            self._changes = changes
            self._store.set_aside = ROOM - 1
        self._sender.owe(self._old)
        self._old = []

    def leave(self, path: str) -> None:
        """Write a copy to a file, for a boot into which the store may not be carried. OSError or NotWritten."""
        make_private(path)
        with open(path, "wb") as file:
            file.write(self._written({}))

    def _written(self, seals: dict[str, int]) -> bytes:
        return written(self._registry.state, self._registry.image(), self._boot, seals)

    def take_back(self, batch: Batch) -> None:
        """The batch has failed: what was stored with it leaves."""
        if any(name in batch.sent for name, _ in self.entries()):
            self.close()
            self._changes = -1

    def close(self) -> None:
        """Close the newest copy; the manager has its own."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            close_fd(fd)
