"""query-command-effect: the command's own judgement, and nothing changes."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest

from gmemd.errors import QmpError
from gmemd.schema.validate import Schema
from tests.commands.conftest import Machine

MIB = 1 << 20
MEMFD = {"qom-type": "memory-backend-memfd", "id": "m0", "size": MIB}
GUEST = {"qom-type": "memory-backend-memfd", "id": "g0", "size": MIB, "share": True, "guest-memfd": "on"}


def effect(machine: Machine, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = machine.execute("query-command-effect", {"command": command, "arguments": arguments})
    return found


def state(machine: Machine) -> Any:
    """Everything that a client can see, and the order in which the next objects would be listed."""
    objects = machine.gmemd.objects
    return (machine.run("query-memdev"), machine.run("query-jobs"), machine.run("query-memdev-rooms"),
            machine.run("qom-list", path="/objects"),
            objects.version, list(objects._slots), sorted(objects._adding), machine.events,
            len(os.listdir("/proc/self/fd")))


@pytest.mark.parametrize(("command", "arguments", "text", "complete"), [
    ("object-add", {**MEMFD, "id": "m1"}, "create 'm1', 1048576 bytes of memfd, which ends with gmemd", True),
    ("object-add", {**MEMFD, "id": "m1", "prealloc": True},
     "create 'm1', 1048576 bytes of memfd, which ends with gmemd", False),
    ("object-add", {"qom-type": "memory-backend-file", "id": "m1", "size": MIB, "mem-path": "/no/such/file"},
     "create 'm1' of 1048576 bytes, which ends with gmemd", False),
    ("object-del", {"id": "m0"}, "delete 'm0' with 0 bytes in memory; its descriptor was handed out 0 times, and"
     " processes that still have it keep the memory", True),
    ("qom-set", {"path": "/objects/m0", "property": "dump", "value": False},
     "change 'dump' of 'm0' from True to False", True),
    ("memdev-convert", {"id": "g0", "offset": 0, "size": 8192, "to": "private"},
     "make 8192 of 8192 bytes of 'g0' private; they would read as zero", False),
    ("memdev-discard", {"id": "m0", "offset": 0, "size": 4096},
     "free 0 of 4096 bytes of 'm0', which then read as zero", True),
    ("quit", {}, "end gmemd; of 2 objects 0 come back with the next one", True),
    ("query-version", {}, "only read", True),
    ("memdev-get-fd", {"id": "m0"}, "be run: its arguments fit", False),
])
def test_what_would_happen_does_not(machine: Machine, command: str, arguments: dict[str, Any], text: str,
                                    complete: bool) -> None:
    machine.execute("object-add", MEMFD)
    machine.execute("object-add", GUEST)
    before = state(machine)
    found = effect(machine, command, arguments)
    assert (found["effect"], found["complete"]) == (f"would {text}", complete)
    assert arguments.items() <= found["arguments"].items()
    assert state(machine) == before


@pytest.mark.parametrize(("command", "arguments"), [
    ("object-add", MEMFD),  # there is one
    ("object-add", {**MEMFD, "id": "1a"}),
    ("object-add", {**MEMFD, "id": "m1", "size": 0}),
    ("object-add", {**MEMFD, "id": "m1", "sise": 4096}),
    ("object-add", {**GUEST, "id": "g1", "size": 4095}),
    ("object-add", {**MEMFD, "id": "m1", "policy": "bind"}),
    ("object-add", {**MEMFD, "id": "m1", "prealloc": True, "size": 1 << 50}),
    ("object-add", {"qom-type": "memory-backend-ram", "id": "m1", "size": 1 << 62}),
    ("object-del", {"id": "m9"}),
    ("qom-set", {"path": "/objects/m0", "property": "size", "value": 1}),
    ("qom-set", {"path": "/objects/m0", "property": "no", "value": 1}),
    ("qom-set", {"path": "/objects", "property": "type", "value": "x"}),
    ("memdev-convert", {"id": "m0", "offset": 0, "size": 4096, "to": "private"}),
    ("memdev-convert", {"id": "g0", "offset": 1, "size": 4096, "to": "private"}),
    ("memdev-discard", {"id": "m0", "offset": MIB, "size": 4096}),
    ("job-dismiss", {"id": "j9"}),
    ("no-such-command", {}),
])
def test_a_refusal_is_the_commands_own(machine: Machine, command: str, arguments: dict[str, Any]) -> None:
    """What the command refuses, the judgement refuses in the same words, and leaves nothing behind."""
    machine.execute("object-add", MEMFD)
    machine.execute("object-add", GUEST)
    before = state(machine)
    with pytest.raises(QmpError) as judged:
        effect(machine, command, arguments)
    assert state(machine) == before
    with pytest.raises(QmpError) as refused:
        machine.execute(command, arguments)
    assert (judged.value.error_class, judged.value.desc) == (refused.value.error_class, refused.value.desc)


def test_arguments_are_an_object(machine: Machine) -> None:
    with pytest.raises(QmpError, match="'arguments' must be an object"):
        machine.run("query-command-effect", command="quit", arguments=[1])


EVERY: dict[str, dict[str, Any]] = {
    "add-fd": {},
    "closefd": {"fdname": "no"},
    "getfd": {"fdname": "f"},
    "job-cancel": {"id": "j"},
    "job-dismiss": {"id": "j"},
    "memdev-adopt": {"fdname": "given", "id": "new", "require-seals": False},
    "memdev-claim": {"name": "no"},
    "memdev-clear-runner": {"id": "m0"},
    "memdev-clone": {"template": "m0", "id": "new", "copy": True},
    "memdev-convert": {"id": "g0", "offset": 0, "size": 4096, "to": "private"},
    "memdev-delete": {"id": "m0", "zero": True},
    "memdev-discard": {"id": "m0", "offset": 0, "size": 4096},
    "memdev-export": {"id": "m0", "fdname": "given"},
    "memdev-import": {"fdname": "given"},
    "memdev-move": {"id": "m0", "fdname": "given", "to": "elsewhere"},
    "memdev-move-resolve": {"id": "m0", "fdname": "given"},
    "memdev-enforce": {"id": "g0", "fdname": "given", "address": 0},
    "memdev-freeze": {"id": "m0"},
    "memdev-handover": {"ids": ["m0"], "old": {"pid": 1, "qmp": "/a"}, "new": {"pid": os.getpid(), "qmp": "/b"}},
    "memdev-handover-end": {"id": "m0", "result": "old"},
    "memdev-get-fd": {"id": "m0", "lease": "keep"},
    "memdev-persist": {"id": "m0", "persist": True},
    "memdev-populate": {"id": "m0", "job-id": "new"},
    "memdev-prepared": {"id": "m0", "fence": "f"},
    "memdev-release": {"id": "m0"},
    "memdev-restore": {"name": "one", "id": "new"},
    "memdev-snapshot": {"id": "m0", "name": "two"},
    "memdev-snapshot-delete": {"name": "one"},
    "memdev-snapshot-flatten": {"name": "one", "cold": True},
    "memdev-snapshot-import": {"name": "two", "file": "given"},
    "memdev-snapshot-verify": {"name": "one"},
    "memdev-get-snapshot": {"name": "one"},
    "memdev-room-add": {"id": "new", "socket": "/no/such/directory"},
    "memdev-room-del": {"id": "r0"},
    "memdev-set-runner": {"id": "m0"},
    "memdev-verify": {"id": "m0", "job-id": "new"},
    "memdev-transaction": {"actions": [{"type": "object-del", "data": {"id": "m0"}},
                                       {"type": "object-add", "data": MEMFD}]},
    "memdev-track": {"id": "m0", "fdname": "given", "address": 0},
    "memdev-untrack": {"id": "m0"},
    "object-add": {**MEMFD, "id": "new"},
    "object-del": {"id": "m0"},
    "qom-set": {"path": "/objects/m0", "property": "prealloc", "value": True},
    "quit": {},
    "remove-fd": {"fdset-id": 7},
    "yank": {"instances": []},
}


@pytest.mark.parametrize("command", EVERY)
def test_no_command_acts(machine: Machine, command: str, tmp_path: Path) -> None:
    """Each changing command is tried up to where it would act, or refused as it would be; nothing changes."""
    machine.execute("object-add", MEMFD)
    machine.execute("object-add", GUEST)
    machine.run("memdev-room-add", id="r0")
    machine.gmemd.snapshots.path = str(tmp_path)
    if "snapshot" in command or command == "memdev-restore":
        machine.execute("memdev-snapshot", {"id": "m0", "name": "one"})
    machine.sent.append(os.memfd_create("given"))
    os.truncate(machine.sent[0], MIB)
    machine.run("getfd", fdname="given")
    before, files = state(machine), set(tmp_path.rglob("*"))
    refused = command in ("job-cancel", "job-dismiss", "memdev-claim", "memdev-clear-runner", "memdev-enforce",
                          "memdev-handover-end", "memdev-move-resolve", "memdev-persist", "memdev-prepared",
                          "memdev-release", "memdev-snapshot-import", "memdev-track", "memdev-untrack")
    with pytest.raises(QmpError) if refused else contextlib.nullcontext():
        assert effect(machine, command, EVERY[command])["effect"].startswith("would ")
    assert (state(machine), set(tmp_path.rglob("*"))) == (before, files)
    os.close(machine.named_fds.take("given"))


def test_every_changing_command_is_tried() -> None:
    assert set(EVERY) == {name for name, command in Schema.load().commands.items() if not command.reads_only}
