"""From a request to its command: the one table of schema commands and their functions.

What most clients do not need is loaded after the start (`Dispatcher.load`): the rest of the commands, and what explains
refusals. Who needs it sooner waits, without holding up others.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any

from gmemd.authority.rights import ALL, OBSERVER, Rights
from gmemd.changes.change import Change, changing, completed
from gmemd.changes.grouped import Grouped
from gmemd.changes.threads import in_thread
from gmemd.commands import control, fds, lease, memdev, properties, qom, status
from gmemd.commands.context import Caller, Function, Gmemd
from gmemd.commands.rooms import reaching_rooms
from gmemd.errors import COMMAND_NOT_FOUND, NotLoaded, QmpError
from gmemd.kernel.program import worker_program
from gmemd.objects.fds import NamedFds
from gmemd.qmp.rows import Pieces
from gmemd.qmp.session import Request, Session
from gmemd.schema.validate import Command

Entries = Mapping[str, tuple[Command, Function]]  # by name

MODULES: tuple[ModuleType, ...] = (control, fds, lease, memdev, properties, qom, status)  # the others: rest.py


class Dispatcher:
    """Runs requests: mode, name, out-of-band, arguments, then the command, in QEMU's order of checks."""

    def __init__(self, gmemd: Gmemd, modules: Sequence[ModuleType] = MODULES) -> None:
        self.gmemd = gmemd
        # Without a change, as others run them.
        self._functions: dict[str, tuple[Command, Function]] = {
            name: (command, _function_in(modules, name) or partial(self._rest, name))
            for name, command in gmemd.schema.commands.items()}
        self._found: dict[str, Function] = {}  # of the rest
        # Commands that change something are given a change.
        self._commands = {
            name: (command, function if command.reads_only else
                   changing(gmemd.settler, function, Grouped if name == "memdev-transaction" else Change))
            for name, (command, function) in self._functions.items()}
        self.loading: asyncio.Future[None] | None = None
        self.loaded = asyncio.Event()  # nothing more is to be loaded
        self._usable: dict[tuple[frozenset[str] | None, bool], Entries] = {}

    def usable(self, rights: Rights) -> Entries:
        """The commands that neither policy forbids: for these a plain request needs no further check."""
        reaching = rights.room is None and (not rights.all or bool(self.gmemd.rooms))
        found = self._usable.get((rights.commands, reaching))
        if found is None:
            found = self._usable[rights.commands, reaching] = {
                name: (command, reaching_rooms(function) if reaching else function)
                for name, (command, function) in self._commands.items()
                if not command.is_forbidden and rights.may(name)}
        return found

    def run(self, request: Request, session: Session, caller: Caller) -> Any:
        """The result of a request, or QmpError."""
        found = caller.usable.get(request.execute)
        if found is None or request.error is not None or request.oob or not session.negotiated:
            found = self._judge(request, session, caller)
        command, function = found
        try:
            return function(caller.room, caller, command.check(request.arguments))
        except NotLoaded:
            return self._run_loaded(request, session, caller)

    async def _run_loaded(self, request: Request, session: Session, caller: Caller) -> Any:
        """The same once everything is loaded; nothing has happened so far."""
        await self.load()
        result = self.run(request, session, caller)
        return await result if isinstance(result, Coroutine) else result

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
        self.gmemd.schema.prepare()

    def _check_wanted(self) -> None:
        if self.gmemd.stopping:
            raise QmpError("gmemd is about to end")

    def _rest(self, name: str, *arguments: Any) -> Any:
        """Run a command of the rest; NotLoaded where that would hold up others."""
        function = self._found.get(name)
        if function is None:
            self.gmemd.schema.check_prepared()
            from gmemd.commands.rest import function_of

            function = self._found[name] = function_of(name, self._functions)
        return function(*arguments)

    async def run_beside(self, request: Request, session: Session, caller: Caller) -> Any:
        """The same for a long request, whose arguments are checked in a thread."""
        command, function = self._judge(request, session, caller)
        arguments = await in_thread(command.check, request.arguments)
        try:
            result = function(caller.room, caller, arguments)
        except NotLoaded:
            await self.load()
            result = function(caller.room, caller, arguments)
        return await result if isinstance(result, Coroutine) else result

    def _judge(self, request: Request, session: Session, caller: Caller) -> tuple[Command, Function]:
        """The command and function of a request, or what is wrong with it, in QEMU's order of checks."""
        if request.error is not None:
            raise request.error
        refusal = session.refuse_mode(request)
        if refusal is not None:
            raise refusal
        found = self._commands.get(request.execute)
        if found is None:
            raise QmpError(f"The command {request.execute} has not been found", COMMAND_NOT_FOUND)
        command = found[0]
        command.check_policy()
        caller.rights.check_command(command.name)
        if request.oob and not command.allow_oob:
            raise QmpError(f"The command {request.execute} does not support OOB")
        return caller.usable.get(request.execute, found)

    async def query(self, name: str, arguments: dict[str, Any]) -> Any:
        """The answer of a command that only reads, for HTTP: a value, or `bytes` that are JSON; or QmpError."""
        command, function = self._commands[name]
        assert command.reads_only
        if not self.loaded.is_set():
            await self.load()
        result = function(self.gmemd, AtStart(self.gmemd, OBSERVER), command.check(arguments))
        if isinstance(result, Coroutine):
            result = await result
        return b"".join(result) if type(result) is Pieces else result

    async def at_start(self, name: str, arguments: dict[str, Any]) -> None:
        """Run a command of the command line, before there are clients; QmpError when it is refused."""
        command, function = self._commands[name]
        await completed(function(self.gmemd, AtStart(self.gmemd), command.check(arguments)))


def _function_in(modules: Sequence[ModuleType], name: str) -> Function | None:
    """The function of a command in these modules, of which later ones override earlier ones."""
    wanted = name.replace("-", "_")
    return next((vars(module)[wanted] for module in reversed(modules) if wanted in vars(module)), None)


class AtStart:
    """The caller of the command line's commands and of the web's queries: gmemd itself."""

    def __init__(self, gmemd: Gmemd, rights: Rights = ALL) -> None:
        self.session: Any = None
        self.rights = rights
        self.usable: Entries = {}
        self.room = gmemd
        self.uid = os.getuid()
        self.pid = os.getpid()
        self.budget = None if gmemd.ledger is None else gmemd.ledger.budget(f"uid:{self.uid}", {})
        self.named_fds = NamedFds()

    def is_gone(self) -> bool:
        return False

    def take_fd(self) -> int:
        raise QmpError("No file descriptor supplied via SCM_RIGHTS")
