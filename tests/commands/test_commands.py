"""The command table, the control commands, and the fd commands."""

from __future__ import annotations

import inspect
import json
import os

from gmemd.backends.base import BASE_ORDER
from gmemd.backends.types import BACKENDS
from gmemd.commands import dispatch, rest, usual
from gmemd.objects.container import ThreadContext
from gmemd.schema.validate import Schema
from tests.commands.conftest import Machine


def test_every_schema_command_has_its_function() -> None:
    """Those that change something are given a change; no function looks like a command and is none."""
    commands, modules = Schema.load().commands, (*dispatch.MODULES, *usual.MODULES, *rest.MODULES)
    own = [(name, found) for module in modules for name, found in vars(module).items()
           if inspect.isroutine(found) and found.__module__ == module.__name__]  # a compiled one is built-in
    taken = {name: [list(inspect.signature(found).parameters) for own_name, found in own
                    if own_name == name.replace("-", "_")] for name in commands
             if name not in ("query-command-effect", "memdev-transaction")}
    assert taken == {name: [["gmemd", "caller", "arguments", *([] if commands[name].reads_only else ["change"])]]
                     for name in taken}
    alike = {name for name, found in own if not name.startswith("_")
             and [*inspect.signature(found).parameters][:3] == ["gmemd", "caller", "arguments"]}
    assert alike == {name.replace("-", "_") for name in taken}


def test_every_object_type_has_its_backend() -> None:
    """ObjectType and the backends are the same, and each lists exactly its declared properties."""
    schema = Schema.load()
    assert sorted(schema.object_types) == sorted([*BACKENDS, ThreadContext.qom_type])
    for qom_type, backend in BACKENDS.items():
        declared = set(schema.properties(qom_type)) - {"id", "qom-type"}
        assert set(backend.property_names()) == declared
        assert set(BASE_ORDER) <= declared


def test_control_commands(machine: Machine) -> None:
    """What a memory daemon without a guest answers."""
    assert json.loads(machine.run("query-status")) == {"status": "prelaunch", "running": False}
    assert json.loads(machine.run("query-version")) == machine.gmemd.version
    assert machine.run("query-name") == {}
    assert machine.run("query-uuid") == {"UUID": "00000000-0000-0000-0000-000000000000"}
    assert machine.run("query-kvm")["enabled"] is False
    assert machine.run("query-yank") == []
    assert machine.run("yank", instances=[]) == {}
    assert machine.refusal("yank", instances=[{"type": "chardev", "id": "x"}]) == (
        "DeviceNotFound", "Instance not found")
    assert machine.refusal("query-nothing") == ("CommandNotFound", "The command query-nothing has not been found")


def test_schema_lists_what_is_answered(machine: Machine) -> None:
    """query-qmp-schema and query-commands agree."""
    schema = json.loads(machine.run("query-qmp-schema"))
    commands = {entry["name"] for entry in schema if entry["meta-type"] == "command"}
    assert commands == {entry["name"] for entry in json.loads(machine.run("query-commands"))}


def test_commands_without_arguments_answer(machine: Machine) -> None:
    """Each query that needs no arguments succeeds when called bare."""
    schema = {entry["name"]: entry for entry in json.loads(machine.run("query-qmp-schema"))}
    for name, entry in schema.items():
        if name.startswith("query-") and all("default" in member for member in schema[entry["arg-type"]]["members"]):
            machine.run(name)


def test_quit_announces_itself(machine: Machine) -> None:
    """quit emits SHUTDOWN once and stops the daemon."""
    assert machine.run("quit") == {}
    assert machine.run("quit") == {}
    assert machine.events == [("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})]
    assert machine.gmemd.stopping


def test_named_fds(machine: Machine) -> None:
    """getfd keeps what came, replaces the same name, refuses digits; closefd closes."""
    nothing = ("GenericError", "No file descriptor supplied via SCM_RIGHTS")
    assert machine.refusal("getfd", fdname="a") == nothing
    for _ in range(2):
        machine.sent.append(os.open(os.devnull, os.O_RDONLY))
        assert machine.run("getfd", fdname="a") == {}
    assert machine.run("closefd", fdname="a") == {}
    assert machine.refusal("closefd", fdname="a") == ("GenericError", "File descriptor named 'a' not found")
    machine.sent.append(os.open(os.devnull, os.O_RDONLY))
    assert machine.refusal("getfd", fdname="1a") == (
        "GenericError", "Parameter 'fdname' expects a name not starting with a digit")


def test_fd_sets(machine: Machine) -> None:
    """add-fd takes the lowest free set, remove-fd one fd or all of it."""
    fds = []
    for _ in range(3):
        machine.sent.append(os.open(os.devnull, os.O_RDONLY))
        fds.append(machine.run("add-fd")["fd"])
    assert [entry["fdset-id"] for entry in machine.run("query-fdsets")] == [2, 1, 0]
    assert machine.run("remove-fd", fdset_id=1) == {}
    assert machine.refusal("remove-fd", fdset_id=1) == (
        "GenericError", "File descriptor named 'fdset-id:1' not found")
    assert machine.refusal("remove-fd", fdset_id=0, fd=fds[2]) == (
        "GenericError", f"File descriptor named 'fdset-id:0, fd:{fds[2]}' not found")
    machine.sent.append(os.open(os.devnull, os.O_RDONLY))
    assert machine.run("add-fd", opaque="x")["fdset-id"] == 1
    machine.sent.append(os.open(os.devnull, os.O_RDONLY))
    assert machine.refusal("add-fd", fdset_id=-1) == (
        "GenericError", "Parameter 'fdset-id' expects a non-negative value")
