"""Commands about the monitor and the daemon itself."""

from __future__ import annotations

from typing import Any

from gmemd.changes.change import Change
from gmemd.commands.context import Caller, Gmemd
from gmemd.errors import DEVICE_NOT_FOUND, QmpError
from gmemd.qmp.encode import encode


def qmp_capabilities(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> dict[str, Any]:
    caller.session.negotiate(arguments.get("enable") or [])
    return {}


def query_version(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> bytes:
    return gmemd.encoded("version", lambda: gmemd.version)


def query_commands(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
    if caller.rights.commands is not None:
        return [{"name": name} for name in gmemd.schema.commands if caller.rights.may(name)]
    return gmemd.encoded("commands", lambda: [{"name": name} for name in gmemd.schema.commands])


def query_qmp_schema(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
    if caller.rights.commands is not None:
        return [entity for entity in gmemd.schema.introspection()
                if entity["meta-type"] != "command" or caller.rights.may(entity["name"])]
    return gmemd.encoded("schema", gmemd.schema.introspection)


def query_status(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> bytes:
    return _STATUS


def query_name(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> dict[str, Any]:
    return {} if gmemd.name is None else {"name": gmemd.name}


def query_uuid(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"UUID": gmemd.uuid or "00000000-0000-0000-0000-000000000000"}


def query_kvm(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"enabled": gmemd.kernel.kvm_enabled, "present": gmemd.kernel.kvm_present}


def yank(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> dict[str, Any]:
    if arguments["instances"]:
        raise QmpError("Instance not found", DEVICE_NOT_FOUND)
    change.judged()
    return {}


def query_yank(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> list[Any]:
    return []


def quit(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> dict[str, Any]:
    kept = sum(backend.record is not None for backend in gmemd.objects)
    change.judged(f"end gmemd; of {len(gmemd.objects)} objects {kept} come back with the next one")
    gmemd.shutdown("host-qmp-quit")
    return {}


# A memory daemon has no vCPUs to run: QEMU's answer under -S.
_STATUS = encode({"status": "prelaunch", "running": False})
