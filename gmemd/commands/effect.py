"""What a command would do: the command itself, up to its last check, and a sentence instead of the act."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from typing import Any

from gmemd.changes.change import Change, Judged
from gmemd.commands.context import Caller, Function, Gmemd
from gmemd.commands.rooms import in_its_room, said_outside
from gmemd.errors import COMMAND_NOT_FOUND, QmpError
from gmemd.schema.validate import Command


def foretell(commands: Mapping[str, tuple[Command, Function]], gmemd: Gmemd, caller: Caller,
             arguments: dict[str, Any]) -> Any:
    """The result of query-command-effect."""
    command, function, complete = found(commands, caller, arguments["command"], arguments.get("arguments", {}))
    if command.reads_only:
        return _answer("only read", complete, whole=True)
    return _foretell(function, *in_its_room(gmemd, complete), caller)


def found(commands: Mapping[str, tuple[Command, Function]], caller: Caller, name: str,
          given: Any) -> tuple[Command, Function, dict[str, Any]]:
    """The command with this name, which the caller may use, its function, and its complete arguments; or QmpError."""
    if name not in commands:
        raise QmpError(f"The command {name} has not been found", COMMAND_NOT_FOUND)
    command, function = commands[name]
    if type(given) is not dict:
        raise QmpError("QMP input member 'arguments' must be an object")
    command.check_policy()
    caller.rights.check_command(name)
    return command, function, command.check(given)


async def _foretell(function: Function, gmemd: Gmemd, complete: dict[str, Any], caller: Caller) -> dict[str, Any]:
    change = Change(gmemd.settler)
    change.budget = caller.budget
    with said_outside(gmemd, complete):
        judged, effect = await judge(function, gmemd, caller, complete, change)
    return _answer(effect, complete, whole=judged.whole)


async def judge(function: Function, gmemd: Gmemd, caller: Caller, complete: dict[str, Any],
                change: Change) -> tuple[Judged, str]:
    """Run a changing command up to where it would act, as this change; the sentence says what it would do."""
    change.dry_run = True
    try:
        result = function(gmemd, caller, complete, change)
        if isinstance(result, Coroutine):  # its checks have to wait
            await result
        raise AssertionError("a changing command without change.judged()")
    except Judged as exc:
        judged = exc
    finally:
        ending = change.revert()
        change.unclaim()
        if ending is not None:
            await ending
    return judged, judged.effect if isinstance(judged.effect, str) else await judged.effect


def _answer(effect: str, complete: dict[str, Any], *, whole: bool) -> dict[str, Any]:
    return {"effect": f"would {effect}", "complete": whole, "arguments": complete}
