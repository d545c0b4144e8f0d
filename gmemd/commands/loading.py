"""What the dispatcher does in coroutines: it waits for what the start has left out, and for work of its own.

What most clients do not need is loaded after the start (`Loader.load`): the rest of the commands. Who needs it sooner
waits, without holding up others.
"""

from __future__ import annotations

import asyncio
import os
from _thread import get_ident
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from gmemd.authority.rights import ALL, OBSERVER, Rights
from gmemd.changes.completed import completed
from gmemd.changes.threads import in_thread
from gmemd.commands.context import Caller, Function, Gmemd
from gmemd.errors import NotLoaded, QmpError
from gmemd.kernel.program import worker_program
from gmemd.objects.fds import NamedFds
from gmemd.qmp.rows import Pieces
from gmemd.schema.validate import Command

Found = tuple[Command, Function]


class Loader:
    """Loads once, and runs what waits for that."""

    def __init__(self, gmemd: Gmemd) -> None:
        self._gmemd = gmemd
        self.loading: asyncio.Future[None] | None = None
        self.loaded = asyncio.Event()  # nothing more is to be loaded
        self._has_loaded = False  # the same, as soon as the thread is done
        self.loads_nothing: int | None = None  # the thread of an event loop that serves

    async def load(self) -> None:
        """Load in a thread what the start has left out, once; QmpError if no thread can be started."""
        if self.loading is None or (self.loading.done() and not self.loaded.is_set()):
            self.loading = asyncio.ensure_future(in_thread(self._load))
        await asyncio.shield(self.loading)
        self.loaded.set()

    def _load(self) -> None:
        self._check_wanted()
        from gmemd.commands import rest  # noqa: F401  # with all that it imports

        self._check_wanted()
        worker_program()
        self._has_loaded = True

    def check_loaded(self) -> None:
        """Raise NotLoaded in the thread that may not load anything, until `load` has done so."""
        if not self._has_loaded and get_ident() == self.loads_nothing:
            raise NotLoaded

    def _check_wanted(self) -> None:
        if self._gmemd.stopping:
            raise QmpError("gmemd is about to end")

    async def run(self, run: Callable[[], Any]) -> Any:
        """The result of a request once everything is loaded; nothing has happened so far."""
        await self.load()
        return await _waited(run())

    async def run_beside(self, judge: Callable[[], Found], arguments: dict[str, Any], caller: Caller) -> Any:
        """The result of a long request, whose arguments are checked in a thread."""
        command, function = judge()
        complete = await in_thread(command.check, arguments)
        try:
            result = function(caller.room, caller, complete)
        except NotLoaded:
            await self.load()
            result = function(caller.room, caller, complete)
        return await _waited(result)

    async def query(self, found: Found, arguments: dict[str, Any]) -> Any:
        """The answer of a command that only reads, for HTTP: a value, or `bytes` that are JSON; or QmpError."""
        command, function = found
        assert command.reads_only
        if not self.loaded.is_set():
            await self.load()
        caller = AtStart(self._gmemd, OBSERVER)
        result = await _waited(function(self._gmemd, caller, command.check(arguments)))
        return b"".join(result) if type(result) is Pieces else result

    async def at_start(self, found: Found, arguments: dict[str, Any]) -> None:
        """Run a command of the command line, before there are clients; QmpError when it is refused."""
        command, function = found
        await completed(function(self._gmemd, AtStart(self._gmemd), command.check(arguments)))


async def _waited(result: Any) -> Any:
    return await result if isinstance(result, Coroutine) else result


class AtStart:
    """The caller of the command line's commands and of the web's queries: gmemd itself."""

    def __init__(self, gmemd: Gmemd, rights: Rights = ALL) -> None:
        self.session: Any = None
        self.rights = rights
        self.usable: Mapping[str, Found] = {}
        self.room = gmemd
        self.uid = os.getuid()
        self.pid = os.getpid()
        self.budget = None if gmemd.ledger is None else gmemd.ledger.budget(f"uid:{self.uid}", {})
        self.named_fds = NamedFds()

    def is_gone(self) -> bool:
        return False

    def take_fd(self) -> int:
        raise QmpError("No file descriptor supplied via SCM_RIGHTS")
