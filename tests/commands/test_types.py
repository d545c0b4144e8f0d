"""The types of objects that a rule allows hold for every command that creates one."""

from __future__ import annotations

import os

import pytest

from tests.commands.conftest import Machine

MIB = 1 << 20


@pytest.mark.parametrize("command", ["object-add", "memdev-clone", "memdev-adopt"])
def test_no_command_creates_what_is_not_allowed(machine: Machine, command: str) -> None:
    machine.become(1000)
    machine.run("object-add", qom_type="memory-backend-memfd", id="m", size=MIB)
    fd = os.memfd_create("given", os.MFD_ALLOW_SEALING)
    os.truncate(fd, MIB)
    machine.sent.append(fd)
    machine.run("getfd", fdname="given")
    arguments = {"object-add": {"qom-type": "memory-backend-memfd", "size": MIB},
                 "memdev-clone": {"template": "m", "copy": True},
                 "memdev-adopt": {"fdname": "given", "require-seals": False}}[command]
    may = machine.rights
    machine.rights = may._replace(types=frozenset(("memory-backend-ram",)))
    judged = {"command": command, "arguments": {**arguments, "id": "new"}}
    assert machine.refusal("query-command-effect", **judged) == (
        "GenericError", "type 'memory-backend-memfd' is disabled by policy")
    machine.rights = may._replace(types=frozenset(("memory-backend-memfd",)))
    machine.run("query-command-effect", **judged)
    os.close(machine.named_fds.take("given"))
    machine.become(None)
