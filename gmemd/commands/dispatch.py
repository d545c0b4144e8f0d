"""From a request to its command: the one table of schema commands and their functions."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any

from gmemd.authority.rights import Rights
from gmemd.changes.change import Change, changing
from gmemd.changes.grouped import Grouped
from gmemd.commands import control, fds, lease, memdev, properties, qom, status
from gmemd.commands.context import Caller, Function, Gmemd
from gmemd.commands.loading import Loader
from gmemd.commands.rooms import reaching_rooms
from gmemd.errors import COMMAND_NOT_FOUND, NotLoaded, QmpError
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
        self.loader = Loader(gmemd)
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
            return self.loader.run(partial(self.run, request, session, caller))

    def _rest(self, name: str, *arguments: Any) -> Any:
        """Run a command of the rest; NotLoaded where that would hold up others."""
        function = self._found.get(name)
        if function is None:
            self.loader.check_loaded()
            from gmemd.commands.rest import function_of

            function = self._found[name] = function_of(name, self._functions)
        return function(*arguments)

    def run_beside(self, request: Request, session: Session, caller: Caller) -> Coroutine[Any, Any, Any]:
        """The same for a long request, whose arguments are checked in a thread."""
        return self.loader.run_beside(partial(self._judge, request, session, caller), request.arguments, caller)

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

    def query(self, name: str, arguments: dict[str, Any]) -> Coroutine[Any, Any, Any]:
        """The answer of a command that only reads, for HTTP: a value, or `bytes` that are JSON; or QmpError."""
        return self.loader.query(self._commands[name], arguments)

    def at_start(self, name: str, arguments: dict[str, Any]) -> Coroutine[Any, Any, None]:
        """Run a command of the command line, before there are clients; QmpError when it is refused."""
        return self.loader.at_start(self._commands[name], arguments)


def _function_in(modules: Sequence[ModuleType], name: str) -> Function | None:
    """The function of a command in these modules, of which later ones override earlier ones."""
    wanted = name.replace("-", "_")
    return next((vars(module)[wanted] for module in reversed(modules) if wanted in vars(module)), None)
