"""From a request to its command: the one table of schema commands and their functions."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any

from gmemd.authority.rights import Rights
from gmemd.changes.change import Change, changing
from gmemd.commands import control
from gmemd.commands.context import Caller, Function, Gmemd, function_in
from gmemd.commands.loading import Loader
from gmemd.commands.rooms import reaching_rooms
from gmemd.errors import COMMAND_NOT_FOUND, NotLoaded, QmpError
from gmemd.qmp.session import Request, Session
from gmemd.schema.validate import Command

Entries = Mapping[str, tuple[Command, Function]]  # by name

MODULES: tuple[ModuleType, ...] = (control,)  # what the start loads; the others: usual.py and rest.py


class Dispatcher:
    """Runs requests: mode, name, out-of-band, arguments, then the command, in QEMU's order of checks."""

    def __init__(self, gmemd: Gmemd, modules: Sequence[ModuleType] = MODULES) -> None:
        self.gmemd = gmemd
        # Without a change, as others run them.
        self._functions: dict[str, tuple[Command, Function]] = {
            name: (command, function_in(modules, name) or partial(self._later, name, False))
            for name, command in gmemd.schema.commands.items()}
        self._commands: dict[str, tuple[Command, Function]] = {
            name: (command, partial(self._later, name, True)) if type(function) is partial else
            self._complete(command, function) for name, (command, function) in self._functions.items()}
        self.loader = Loader(gmemd)
        self._usable: dict[tuple[frozenset[str] | None, bool], dict[str, tuple[Command, Function]]] = {}

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
        except NotLoaded as wanted:
            return self.loader.run(wanted, partial(self.run, request, session, caller))

    def _complete(self, command: Command, function: Function) -> tuple[Command, Function]:
        """As clients run it: a command that changes something is given a change."""
        if command.reads_only:
            return command, function
        if command.name == "memdev-transaction":
            from gmemd.changes.grouped import Grouped

            return command, changing(self.gmemd.settler, function, Grouped)
        return command, changing(self.gmemd.settler, function, Change)

    def _later(self, name: str, complete: bool, *arguments: Any) -> Any:
        """Run a command that the start has left out, which takes its place; NotLoaded where that holds up others."""
        command = self._functions[name][0]
        function = self.loader.function_of(name, self._functions)
        self._functions[name] = command, function
        found = self._commands[name] = self._complete(command, function)
        for (_, reaching), usable in self._usable.items():
            if name in usable:
                usable[name] = (command, reaching_rooms(found[1])) if reaching else found
        return (found[1] if complete else function)(*arguments)

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
