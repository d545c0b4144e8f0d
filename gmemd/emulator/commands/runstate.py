"""Commands about running, stopping and ending.

Run states: prelaunch -> running <-> paused; shutdown when the guest has powered down and the process stays.
Events are sent before the reply: clients follow the events, not the replies.
"""

from __future__ import annotations

import asyncio
from typing import Any

from gmemd.changes.change import Change
from gmemd.commands.context import Caller, Gmemd
from gmemd.emulator.guest import obeyed
from gmemd.emulator.machine import Machine
from gmemd.emulator.tree import machine_of
from gmemd.errors import QmpError

POWERDOWN_SECONDS = 0.02  # how long a cooperative guest takes


def query_status(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> dict[str, Any]:
    status = machine_of(gmemd).status
    return {"status": status, "running": status == "running"}


def cont(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> Any:
    change.judged()
    machine = machine_of(gmemd)
    if machine.status == "shutdown":
        raise QmpError("Resetting the Virtual Machine is required")
    if machine.status == "running":
        return {}
    machine.status = "running"
    gmemd.emit("RESUME", {})
    return obeyed(machine)


def stop(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> dict[str, Any]:
    change.judged()
    _halt(gmemd, machine_of(gmemd), "paused")
    return {}


def _halt(gmemd: Gmemd, machine: Machine, status: str) -> None:
    if machine.status == "running":
        machine.status = status
        gmemd.emit("STOP", {})


def system_reset(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> dict[str, Any]:
    change.judged()
    machine = machine_of(gmemd)
    if machine.actions["reboot"] == "shutdown":
        _shut_down(gmemd, machine, guest=False, reason="host-qmp-system-reset")
        return {}
    if machine.status != "running":
        machine.status = "prelaunch"
    gmemd.emit("RESET", {"guest": False, "reason": "host-qmp-system-reset"})
    return {}


def system_powerdown(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> dict[str, Any]:
    change.judged()
    gmemd.emit("POWERDOWN", {})
    asyncio.get_running_loop().call_later(POWERDOWN_SECONDS, _power_down, gmemd, machine_of(gmemd))
    return {}


def _power_down(gmemd: Gmemd, machine: Machine) -> None:
    if machine.status == "running":
        _shut_down(gmemd, machine, guest=True, reason="guest-shutdown")


def _shut_down(gmemd: Gmemd, machine: Machine, *, guest: bool, reason: str) -> None:
    gmemd.emit("SHUTDOWN", {"guest": guest, "reason": reason})
    if machine.actions["shutdown"] == "pause":
        _halt(gmemd, machine, "shutdown")
    else:
        gmemd.stop()


def set_action(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> dict[str, Any]:
    change.judged()
    machine_of(gmemd).actions.update(arguments)
    return {}
