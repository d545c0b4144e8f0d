"""What a command sees (`Gmemd`, `Caller`) and what it may return besides a plain value.

A command is a function `name(gmemd, caller, arguments)` with complete, checked arguments.  It returns
- a JSON value, or `bytes` that are JSON already;
- `WithFds`, a value whose reply carries file descriptors;
- `Change`, a value that is acknowledged only when custody has made it durable;
- a coroutine that gives one of these, when the work is long.
It raises QmpError to refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Protocol

from gmemd.errors import QmpError
from gmemd.fds import FdSets, NamedFds
from gmemd.objects import Objects
from gmemd.qmp.encode import encode
from gmemd.qmp.session import Session

if TYPE_CHECKING:
    from gmemd.kernel.base import Kernel
    from gmemd.persist.custody import Custody, Operation
    from gmemd.schema.validate import Schema


class WithFds:
    """A reply with file descriptors; they belong to it and are closed once it is sent."""

    __slots__ = ("fds", "value")

    def __init__(self, value: Any, fds: list[int]) -> None:
        self.value = value
        self.fds = fds


class Change:
    """A change made in memory that custody has been told of, by `operation`.

    `done` runs when it is durable, `undo` when it could not be made so; the reply waits for either.
    """

    __slots__ = ("done", "error", "operation", "undo", "value")

    def __init__(self, value: Any, operation: Operation, *, undo: Callable[[], None],
                 done: Callable[[], None] | None = None) -> None:
        self.value = value
        self.operation = operation
        self.undo = undo
        self.done = done
        self.error: QmpError | None = None  # set when it was undone


class Caller(Protocol):
    """The monitor that a command came from."""

    session: Session
    uid: int
    pid: int

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
        self.objects = Objects()
        self.named_fds = NamedFds()
        self.fd_sets = FdSets()
        self.stopping = False
        self._encoded: dict[str, bytes] = {}
        # Set by the daemon: send an event to every negotiated client; end the process soon; run a coroutine as
        # a task; make changes durable, or undo them, and then call back.
        self.emit: Callable[[str, dict[str, Any]], None]
        self.stop: Callable[[], None]
        self.spawn: Callable[[Coroutine[Any, Any, None]], None]
        self.settle: Callable[[list[Change], Callable[[], None]], None]

    def encoded(self, key: str, make: Callable[[], Any]) -> bytes:
        """The encoded value of `make()`, which never changes while the daemon runs; made at the first call."""
        if key not in self._encoded:
            self._encoded[key] = encode(make())
        return self._encoded[key]

    def shutdown(self, reason: str) -> None:
        """Announce the end (SHUTDOWN event) and bring it about; objects stay with custody."""
        if not self.stopping:
            self.stopping = True
            self.emit("SHUTDOWN", {"guest": False, "reason": reason})
            self.stop()

    def close(self) -> None:
        """Release every fd that this process holds."""
        self.named_fds.close()
        self.fd_sets.close()
        for backend in list(self.objects):
            backend.close()
        self.kernel.close()
