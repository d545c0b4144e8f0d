"""A daemon's custody, its manager and its registry, with crashes that leave everything else standing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from gmemd.persist.batch import Operation
from gmemd.persist.carried import newest, put_back
from gmemd.persist.custody import Custody
from gmemd.persist.fdstore import FdStore
from gmemd.persist.notify import Notifier
from gmemd.persist.record import Record, Row
from gmemd.persist.registry import NotWritten, Registry
from gmemd.persist.restore import Restored
from gmemd.persist.waits import Flush, Wait, wait_for
from tests.persist.luo import carried
from tests.persist.manager import KeeperAsManager, StandIn

Hook = Callable[[str], None]


def ignore(step: str) -> None:
    """The hook of a run that nobody watches."""


class WatchedNotifier(Notifier):
    """Calls the hook before and after each message; the hook may raise what sendmsg could."""

    hook: Hook = staticmethod(ignore)

    def notify(self, text: str, fds: Iterable[int] = ()) -> None:
        self.hook(f"before {text.split()[0]}")
        super().notify(text, fds)
        self.hook(f"after {text.split()[0]}")


class WatchedRegistry(Registry):
    """Calls the hook before and after each transaction; the hook may raise NotWritten."""

    hook: Hook = staticmethod(ignore)

    def apply(self, **what: Any) -> None:
        self._tried = None
        self.hook("before transaction")
        super().apply(**what)
        self.hook("after transaction")


class World:
    """`start` again after each crash; `close` at the end."""

    def __init__(self, directory: Path, limit: int = 1024, *, carries: bool = False,
                 manager: StandIn | KeeperAsManager | None = None) -> None:
        """carries: the host has live update. manager: another than a stand-in with that limit."""
        self.carries = carries
        self.boot = 1
        self.directory = directory
        directory.mkdir(exist_ok=True)
        self.path = str(directory / "registry")
        self.manager: Any = manager or StandIn(directory, limit)
        self.hook: Hook = ignore
        self.memory: list[int] = []  # all fds made or given back, closed at the end
        self.custody: Custody | None = None
        self.restored = Restored()

    def start(self) -> Custody:
        """A new daemon."""
        self.manager.begin()
        self.notifier = WatchedNotifier(self.manager.address, several=self.manager.several,
                                        sure=self.manager.sure)
        fds = self.manager.hand_down()
        copy = newest(fds)
        self.put_back = put_back(copy, self.path)
        self.registry = WatchedRegistry(self.path, spare=list if copy is None else copy.records)
        self.notifier.hook = self.registry.hook = lambda step: self.hook(step)
        self.custody = Custody(self.registry, self.notifier, FdStore(self.manager.limit), carries=self.carries,
                               boot=f"{self.boot:032x}")
        self.restored = self.custody.restore(fds, copy=copy)
        self.memory += [fd for _, fd in self.restored.objects + self.restored.unclaimed if fd >= 0]
        return self.custody

    def crash(self) -> None:
        """The daemon is gone; what it sent is still received."""
        self.hook = ignore
        self.notifier.close()
        if self.custody is not None:
            self.custody.close()
        self.manager.receive()
        self.custody = None

    def restart(self) -> Custody:
        self.crash()
        return self.start()

    def kexec(self, *, kept: bool = False) -> Custody:
        """Another kernel: the manager's memfds are carried, the registry's directory only if it is `kept`."""
        self.crash()
        self.boot += 1
        before, self.manager.store = self.manager.store, []
        for name, fd in before:
            new = carried(fd)
            os.close(fd)
            if new >= 0:
                self.manager.store.append((name, new))
        for ending in () if kept else ("", "-journal"):
            with suppress(FileNotFoundError):
                os.unlink(self.path + ending)
        return self.start()

    def carry(self) -> None:
        """Have a copy of the registry in the store."""
        assert self.custody is not None
        self.custody.copies.ask(lambda: self.manager.store)
        self.flush()

    def copy(self, name: str) -> World:
        """What a crash at this moment would leave: registry and store, not the daemon."""
        other = World(self.directory / name, self.manager.limit)
        for suffix in ("", "-journal"):
            if os.path.exists(self.path + suffix):
                shutil.copy(self.path + suffix, other.path + suffix)
        self.manager.receive()
        other.manager.store = self.manager.hand_down()
        return other

    def close(self) -> None:
        if self.custody is not None:
            self.crash()
        for fd in self.memory:
            os.close(fd)
        self.manager.close()

    def record(self, id_: str, version: int = 0) -> Record:
        return Record(id_, "memory-backend-memfd", {"id": id_}, "memfd", 4096, extra={"version": version})

    def add(self, id_: str) -> Operation:
        """Reserve, make and add, as the daemon does."""
        assert self.custody is not None
        self.custody.reserve()
        fd = os.memfd_create(id_[:5])
        os.truncate(fd, 4096)
        self.memory.append(fd)
        return self.custody.add(self.record(id_), fd)

    def flush(self) -> None:
        """Flush with a manager that answers at once."""
        assert self.custody is not None
        while self.custody.dirty:
            self.run(self.custody.flush())

    def run(self, flush: Flush, answer: Callable[[Wait], bool] | None = None) -> None:
        """Drive one flush."""
        try:
            wait = next(flush)
            while True:
                self.hook(f"waits until {wait.what}")
                wait = flush.send((answer or self._served)(wait))
        except StopIteration:
            return

    def _served(self, wait: Wait) -> bool:
        self.manager.receive()
        assert wait_for(wait, 0)
        return True


def full_disk(step: str) -> None:
    """A hook: no transaction can be written."""
    if step == "before transaction":
        raise NotWritten("database or disk is full")


def rows(registry: Registry) -> list[Row]:
    """What stands in the file."""
    assert registry._db is not None
    return registry._db.execute("SELECT id, seq, fd_name FROM objects ORDER BY seq").fetchall()
