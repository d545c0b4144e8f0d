"""From a request to its command: the one table of schema commands and their functions."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from types import CoroutineType, ModuleType
from typing import Any

from gmemd.authority.rights import ALL, OBSERVER, Rights
from gmemd.changes.change import Change, changing, completed
from gmemd.changes.grouped import Grouped
from gmemd.changes.threads import in_thread
from gmemd.commands import (
    accounting,
    arriving,
    clones,
    cloning,
    control,
    conversion,
    enforce,
    fds,
    handovers,
    holders,
    housing,
    importing,
    jobs,
    lease,
    memdev,
    ownership,
    owning,
    prepared,
    properties,
    qom,
    quota,
    restoring,
    rights,
    runners,
    saving,
    sending,
    snapshots,
    status,
    track,
)
from gmemd.commands.context import Caller, Function, Gmemd
from gmemd.commands.effect import foretell
from gmemd.commands.rooms import reaching_rooms
from gmemd.commands.transaction import carry_out
from gmemd.errors import COMMAND_NOT_FOUND, QmpError
from gmemd.objects.fds import NamedFds
from gmemd.qmp.rows import Pieces
from gmemd.qmp.session import Request, Session
from gmemd.schema.validate import Command

Entries = Mapping[str, tuple[Command, Function]]  # by name

MODULES: tuple[ModuleType, ...] = (
    accounting, arriving, clones, cloning, control, conversion, enforce, fds, handovers, holders, housing, importing,
    jobs, lease, memdev, ownership, owning, prepared, properties, qom, quota, restoring, rights, runners, saving,
    sending, snapshots, status, track)


def find_function(name: str, modules: Sequence[ModuleType] = MODULES) -> Function:
    """The function of a command of the schema; later modules override earlier ones."""
    wanted = name.replace("-", "_")
    found: Function = next(vars(module)[wanted] for module in reversed(modules) if wanted in vars(module))
    return found


class Dispatcher:
    """Runs requests: mode, name, out-of-band, arguments, then the command, in QEMU's order of checks."""

    def __init__(self, gmemd: Gmemd, modules: Sequence[ModuleType] = MODULES) -> None:
        self.gmemd = gmemd
        functions: dict[str, tuple[Command, Function]] = {}
        # Commands that run others.
        outer = {"query-command-effect": partial(foretell, functions),
                 "memdev-transaction": partial(carry_out, functions)}
        for name, command in gmemd.schema.commands.items():
            functions[name] = command, outer[name] if name in outer else find_function(name, modules)
        # Commands that change something are given a change.
        self._commands = {
            name: (command, function if command.reads_only else
                   changing(gmemd.settler, function, Grouped if name in outer else Change))
            for name, (command, function) in functions.items()}
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
        return function(caller.room, caller, command.check(request.arguments))

    async def run_beside(self, request: Request, session: Session, caller: Caller) -> Any:
        """The same for a long request, whose arguments are checked in a thread."""
        command, function = self._judge(request, session, caller)
        result = function(caller.room, caller, await in_thread(command.check, request.arguments))
        return await result if isinstance(result, CoroutineType) else result

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
        result = function(self.gmemd, AtStart(self.gmemd, OBSERVER), command.check(arguments))
        if isinstance(result, CoroutineType):
            result = await result
        return b"".join(result) if type(result) is Pieces else result

    async def at_start(self, name: str, arguments: dict[str, Any]) -> None:
        """Run a command of the command line, before there are clients; QmpError when it is refused."""
        command, function = self._commands[name]
        await completed(function(self.gmemd, AtStart(self.gmemd), command.check(arguments)))


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
