"""Run states, what libvirt asks of a machine, the human monitor, and the QAPI of all that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import gmemd.schema
from gmemd.qapi.document import json_schema
from gmemd.qapi.entities import Enum
from gmemd.qapi.load import load
from gmemd.schema.validate import Schema
from tests.emulator.conftest import MIB, PC, Machine, Start

QAPI = Path(gmemd.schema.__path__[0]) / "qapi"


# -- the schema


def test_everything_of_gmemd_is_there() -> None:
    """The emulator speaks all that gmemd speaks, and has every object type of it: new modules go into core.json."""
    plain, emulator = Schema.load(), Schema.load("emulator.json")
    assert set(plain.commands) - set(emulator.commands) == set()
    assert set(plain.events) - set(emulator.events) == set()
    assert set(plain.object_types) | {"secret", "thread-context"} == set(emulator.object_types)


def test_document_is_current() -> None:
    """emulator.json says what emulator.json of the QAPI source says."""
    written = Schema.load("emulator.json").document
    assert json_schema(load(QAPI / "emulator.json"), title=written["title"]) == written


def test_everything_is_documented() -> None:
    """Every definition, member and value of the machine has its text."""
    entities = load(QAPI / "emulator.json")
    assert [entity.name for entity in entities.visited if not (entity.doc and entity.doc.summary)] == []
    enums = [entity for entity in entities.visited if isinstance(entity, Enum)]
    assert [f"{enum.name}.{value.name}" for enum in enums for value in enum.values if not value.doc] == []


async def test_guest_memfd_is_detectable(start: Start) -> None:
    """A client that looks for memory-backend-memfd's member guest-memfd in query-qmp-schema finds it."""
    machine = await start("-machine", "none")
    entries = {entry["name"]: entry for entry in machine.gmemd.schema.introspection()}
    union = entries[entries["object-add"]["arg-type"]]
    [branch] = [entry["type"] for entry in union["variants"] if entry["case"] == "memory-backend-memfd"]
    assert "guest-memfd" in [member["name"] for member in entries[branch]["members"]]


async def test_command_answers_fit_their_schema(start: Start) -> None:
    """What the machine's query commands answer is what their schema promises."""
    import jsonschema

    machine = await start(*PC, "-smp", "2", "-S")
    await machine.run("object-add", qom_type="memory-backend-memfd", id="m0", size=MIB)
    await machine.run("device_add", driver="pc-dimm", id="d0", memdev="m0")
    await machine.run("device_add", driver="virtio-balloon-pci", id="b0")
    document = machine.gmemd.schema.document
    asked = 0
    for name, entry in document["x-commands"].items():
        if name.startswith("query-") and not document["$defs"][entry["arguments"]].get("required"):
            answer = await machine.run(name)
            if not isinstance(answer, bytes):
                jsonschema.Draft202012Validator({**entry["returns"], "$defs": document["$defs"]}).validate(answer)
                asked += 1
    assert asked > 20


# -- run states


async def test_run_states(start: Start) -> None:
    """Events tell each change before the reply; what changes nothing tells nothing."""
    machine = await start(*PC, "-S")

    async def status() -> str:
        answer = await machine.run("query-status")
        assert answer["running"] == (answer["status"] == "running")
        return str(answer["status"])

    assert await status() == "prelaunch"
    await machine.run("stop")
    assert (await status(), machine.events) == ("prelaunch", [])
    for _ in range(2):
        await machine.run("cont")
        assert (await status(), machine.events) == ("running", [("RESUME", {})])
    for _ in range(2):
        await machine.run("stop")
        assert (await status(), machine.events[1:]) == ("paused", [("STOP", {})])
    await machine.run("system_reset")
    assert machine.events[2:] == [("RESET", {"guest": False, "reason": "host-qmp-system-reset"})]
    assert await status() == "prelaunch"
    assert (await (await start()).run("query-status"))["status"] == "running"


async def test_powerdown(start: Start) -> None:
    """A running machine obeys: the process ends, or with -no-shutdown stays until it is reset and continued."""
    machine = await start()
    await machine.run("system_powerdown")
    assert machine.events == [("POWERDOWN", {})]
    assert await machine.wait_event("SHUTDOWN") == {"guest": True, "reason": "guest-shutdown"}
    assert machine.stopped

    machine = await start(*PC, "-no-shutdown")
    await machine.run("system_powerdown")
    await machine.wait_event("STOP")
    assert not machine.stopped
    assert (await machine.run("query-status"))["status"] == "shutdown"
    assert await machine.refusal("cont") == "Resetting the Virtual Machine is required"
    await machine.run("system_reset")
    await machine.run("cont")
    assert (await machine.run("query-status"))["status"] == "running"


async def test_stopped_machine_does_not_power_down(start: Start) -> None:
    """Nobody obeys while nothing runs."""
    machine = await start(*PC, "-S")
    await machine.run("system_powerdown")
    await machine.run("object-add", qom_type="memory-backend-memfd", id="m0", size=MIB)
    await machine.run("device_add", driver="pc-dimm", id="d0", memdev="m0")
    await machine.run("device_del", id="d0")
    await machine.wait_event("DEVICE_DELETED")  # as long as a powerdown takes
    assert [name for name, _ in machine.events] == ["POWERDOWN", "DEVICE_DELETED"]


async def test_actions(start: Start) -> None:
    """set-action and -no-reboot choose what becomes of a reset."""
    machine = await start(*PC, "-no-reboot")
    await machine.run("set-action", shutdown="pause", panic="pause")
    await machine.run("system_reset")
    assert machine.events == [("SHUTDOWN", {"guest": False, "reason": "host-qmp-system-reset"}), ("STOP", {})]
    assert not machine.stopped


# -- what clients ask


async def test_cpus(start: Start) -> None:
    """Processors stand where -smp and -numa put them; places without one are hot-pluggable."""
    objects = [word for i in range(2) for word in ("-object", f"memory-backend-ram,id=r{i},size=32M")]
    nodes = [word for i in range(2) for word in ("-numa", f"node,nodeid={i},memdev=r{i},cpus={i}")]
    machine = await start(*objects, *nodes, "-m", "64", "-smp", "1,maxcpus=2,sockets=2,cores=1,threads=1")
    [cpu] = await machine.run("query-cpus-fast")
    assert cpu["props"] == {"socket-id": 0, "core-id": 0, "thread-id": 0, "node-id": 0}
    assert (await machine.run("qom-list", path=cpu["qom-path"]))[0] == {"name": "type", "type": "string"}
    empty, taken = await machine.run("query-hotpluggable-cpus")
    assert (empty["props"]["node-id"], "qom-path" in empty) == (1, False)
    assert taken["qom-path"] == cpu["qom-path"]
    none = await start("-machine", "none")
    assert await none.run("query-cpus-fast") == []
    assert await none.refusal("query-hotpluggable-cpus") == "machine does not support hot-plugging CPUs"


async def test_machine_names(start: Start) -> None:
    """An alias, a version of another release and the name itself are the same machine."""
    for name in ("pc", "pc-i440fx-7.2", "pc-i440fx-11.1"):
        machine = await start("-machine", name)
        assert await machine.run("qom-get", path="/machine", property="type") == "pc-i440fx-11.1-machine"
    machine = await start("-machine", "q35,acpi=off", "-name", "x")
    assert await machine.run("qom-get", path="/machine", property="acpi") == "off"
    assert await machine.run("qom-get", path="/machine", property="x-command-line") == "-machine q35,acpi=off -name x"
    assert "machine" in [entry["name"] for entry in await machine.run("qom-list", path="/")]


async def test_types(start: Start) -> None:
    """Types of the machine are listed with those of gmemd; devices can be told from what is none."""
    machine = await start("-machine", "none")
    creatable = {entry["name"] for entry in await machine.run("qom-list-types", implements="user-creatable")}
    assert {"secret", "thread-context", "memory-backend-memfd"} <= creatable
    machines = {entry["name"] for entry in await machine.run("qom-list-types", implements="machine", abstract=True)}
    assert {"machine", "none-machine", "generic-pc-machine"} <= machines
    for name in ("pc-dimm", "virtio-balloon-pci"):
        assert await machine.run("device-list-properties", typename=name)
        assert await machine.run("qom-list-properties", typename=name)
    assert {"name": "acpi", "type": "OnOffAuto"} in await machine.run("qom-list-properties", typename="none-machine")
    assert await machine.run("qom-list-properties", typename="secret")
    assert await machine.refusal("device-list-properties", typename="device") == \
        "Parameter 'typename' expects a non-abstract device type"
    assert await machine.refusal("device-list-properties", typename="usb-host") == "Device 'usb-host' not found"


async def test_cpu_models(start: Start) -> None:
    """qemu64 and max are there, host only with KVM; every model expands to qemu64's features."""
    machine = await start()
    names = [entry["name"] for entry in await machine.run("query-cpu-definitions")]
    assert names == ["max", "qemu64"]
    expanded = await machine.run("query-cpu-model-expansion", type="static", model={"name": "max"})
    assert expanded["model"]["props"]["sse2"] is True
    assert await machine.refusal("query-cpu-model-expansion", type="full", model={"name": "z80"}) == \
        "The CPU model 'z80' is unknown."


async def test_migration_capabilities_are_kept(start: Start) -> None:
    """What is enabled stays enabled; there is no command that migrates."""
    machine = await start()
    await machine.run("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
    states = {entry["capability"]: entry["state"] for entry in await machine.run("query-migrate-capabilities")}
    assert [name for name, state in states.items() if state] == ["events"]
    assert await machine.run("query-migrate") == {}
    assert await machine.refusal("migrate") == "The command migrate has not been found"


async def test_chardevs_and_options(start: Start) -> None:
    """query-chardev lists the command line's; query-command-line-options what is honoured."""
    machine = await start("-chardev", "socket,id=c,path=/c,server=on", "-mon", "c,mode=control", "-chardev",
                          "pty,id=p", "-chardev", "file,id=f,path=/f")
    assert await machine.run("query-chardev") == [
        {"label": "c", "filename": "unix:/c,server=on", "frontend-open": True},
        {"label": "p", "filename": "pty", "frontend-open": False},
        {"label": "f", "filename": "file:/f", "frontend-open": False}]
    [option] = await machine.run("query-command-line-options", option="memory")
    assert [parameter["name"] for parameter in option["parameters"]] == ["size", "slots", "maxmem"]
    assert await machine.refusal("query-command-line-options", option="foo") == "invalid option name: foo"
    for command in ("query-block", "query-named-block-nodes", "query-blockstats", "query-iothreads", "query-jobs"):
        assert await machine.run(command) == []


# -- people


@pytest.mark.parametrize(("line", "text"), [
    ("info status", "VM status: running\r\n"),
    ("info name", "n\r\n"),
    ("info uuid", "00000000-0000-0000-0000-000000000000\r\n"),
    ("info version", "11.1.0test\r\n"),
    ("info kvm", "kvm support: disabled\r\n"),
    ("info memory_size_summary", "base memory: 67108864\r\nplugged memory: 134217728\r\n"),
    ("info memory-devices", 'Memory device [dimm]: "d0"\r\n  addr: 0x100000000\r\n  slot: 0\r\n  node: 0\r\n'
                            "  size: 134217728\r\n  memdev: /objects/m0\r\n  hotplugged: true\r\n"
                            "  hotpluggable: true\r\n"),
    ("info numa", "1 nodes\r\nnode 0 cpus: 0\r\nnode 0 size: 192 MB\r\nnode 0 plugged: 128 MB\r\n"),
    ("info balloon", "Error: No balloon device has been activated\r\n"),
    ("help info status", "info status  -- show the current VM status (running|paused)\r\n"),
    ("stop", ""),
    ("", ""),
    ("foo bar", "unknown command: 'foo'\r\n"),
    ("info foo", "unknown command: 'info foo'\r\n"),
])
async def test_human_monitor(line: str, text: str, start: Start) -> None:
    """The commands that people type at libvirt's --hmp, worded and laid out as QEMU's."""
    machine = await started_for_people(start)
    answer = await machine.run("human-monitor-command", command_line=line)
    assert answer == (text if line != "info kvm" else answer)
    assert answer.startswith(text.split(":")[0])


async def started_for_people(start: Start) -> Machine:
    machine = await start("-object", "memory-backend-memfd,id=r0,size=64M", "-numa", "node,memdev=r0,cpus=0",
                          "-m", "64,slots=1,maxmem=1G", "-name", "n")
    await machine.run("object-add", qom_type="memory-backend-memfd", id="m0", size=128 * MIB)
    await machine.run("device_add", driver="pc-dimm", id="d0", memdev="m0")
    return machine


async def test_info_memdev(start: Start) -> None:
    """info memdev shows for each object what query-memdev does."""
    machine = await started_for_people(start)
    text: Any = await machine.run("human-monitor-command", command_line="info memdev")
    entries = {entry.splitlines()[0]: entry for entry in text.split("memory backend: ")[1:]}
    assert entries["m0"].splitlines()[:9] == [
        "m0", "  size:  134217728", "  merge: true", "  dump: true", "  prealloc: false", "  share: true",
        "  reserve: true", "  policy: default", "  host nodes: "]
    assert "info memdev  -- show memory backends" in await machine.run("human-monitor-command", command_line="help")
    assert "* CPU #0" in await machine.run("human-monitor-command", command_line="info cpus")
    assert "info numa" in await machine.run("human-monitor-command", command_line="info")
