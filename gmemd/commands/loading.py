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
from gmemd.commands.context import Caller, Function, Gmemd, function_in
from gmemd.errors import NotLoaded, QmpError
from gmemd.objects.fds import NamedFds
from gmemd.qmp.rows import Pieces
from gmemd.schema.validate import Command

Found = tuple[Command, Function]

_USUAL = "usual"
_REST = "rest"


class Loaded:
    """A request whose command is loaded now, and has not begun: loading is no long command of the client's."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.run = run


class Loader:
    """Loads once, and runs what waits for that."""

    def __init__(self, gmemd: Gmemd) -> None:
        self._gmemd = gmemd
        self.loading: dict[str, asyncio.Future[None]] = {}  # by what is loaded
        self.loaded = asyncio.Event()  # nothing more is to be loaded
        self._has: set[str] = set()  # the same, as soon as the thread is done
        self.first: Callable[[], None] = lambda: None  # is called in the thread before anything is loaded
        self.loads_nothing: int | None = None  # the thread of an event loop that serves

    async def load(self) -> None:
        """Load in a thread what the start has left out, once; QmpError if no thread can be started."""
        await self.load_usual()
        await self.once(_REST, self._load_rest)
        self.loaded.set()

    async def load_usual(self) -> None:
        """The same for the commands that most clients use."""
        await self.once(_USUAL, self._load_usual)

    async def once(self, name: str, load: Callable[[], None]) -> None:
        """Load something in a thread, for which the daemon's end waits."""
        before = self.loading.get(name)
        if before is None or (before.done() and (before.cancelled() or before.exception() is not None)):
            self.loading[name] = asyncio.ensure_future(in_thread(load))
        await asyncio.shield(self.loading[name])

    def _load_usual(self) -> None:
        self._check_wanted()
        self.first()
        from gmemd.commands import usual  # noqa: F401  # with all that it imports

        self._has.add(_USUAL)

    def _load_rest(self) -> None:
        self._check_wanted()
        from gmemd.commands import rest  # noqa: F401  # with all that it imports
        from gmemd.kernel.program import worker_program

        self._check_wanted()
        worker_program()
        self._has.add(_REST)

    def _check_wanted(self) -> None:
        if self._gmemd.stopping:
            raise QmpError("gmemd is about to end")

    def function_of(self, name: str, functions: dict[str, Any]) -> Function:
        """The function of a command; NotLoaded in the thread that may load nothing, until that is done.

        `functions`: what commands that run others run, by name.
        """
        self._check(_USUAL)
        from gmemd.commands import usual

        found = function_in(usual.MODULES, name)
        if found is None:
            self._check(_REST)
            from gmemd.commands.rest import function_of

            found = function_of(name, functions)
        return found

    def _check(self, name: str) -> None:
        if name not in self._has and get_ident() == self.loads_nothing:
            raise NotLoaded(name)

    async def run(self, wanted: NotLoaded, run: Callable[[], Any]) -> Loaded:
        """Load what a request wants; nothing of it has happened so far."""
        await (self.load_usual() if wanted.args == (_USUAL,) else self.load())
        return Loaded(run)

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
