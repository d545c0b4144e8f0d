"""Commands about what the client may."""

from __future__ import annotations

from typing import Any

from gmemd.commands.context import Caller, Gmemd
from gmemd.errors import COMMAND_NOT_FOUND, QmpError


def query_memdev_rights(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> dict[str, Any]:
    rights, schema = caller.rights, gmemd.schema
    answer: dict[str, Any] = {
        "uid": caller.uid, "policy": not rights.all, "role": rights.role.word, "commands": sorted(caller.usable),
        "types": [name for name in schema.object_types if rights.types is None or name in rights.types]}
    if rights.paths is not None:
        answer["paths"] = list(rights.paths)
    if "command" in arguments:
        reason = _refusal(gmemd, caller, arguments["command"], arguments.get("id"))
        answer["allowed"] = not reason
        if reason:
            answer["reason"] = reason
    elif "id" in arguments:
        raise QmpError("Parameter 'command' is missing")
    return answer


def _refusal(gmemd: Gmemd, caller: Caller, name: str, object_id: str | None) -> str:
    """Why a command may not be used, on an object; "" if it may."""
    command = gmemd.schema.commands.get(name)
    try:
        if command is None:
            raise QmpError(f"The command {name} has not been found", COMMAND_NOT_FOUND)
        command.check_policy()
        caller.rights.check_command(name)
        if object_id is not None:
            gmemd.objects.find(object_id)
    except QmpError as exc:
        return exc.desc
    return ""
