"""Commands about the machine, its processors, character and block devices, and migration."""

from __future__ import annotations

from typing import Any

from gmemd.changes.change import Change
from gmemd.commands import qom
from gmemd.commands.context import Caller, Gmemd
from gmemd.emulator.machine_types import MACHINES
from gmemd.emulator.tables import DEVICES
from gmemd.emulator.topology import CPU_TYPE
from gmemd.emulator.tree import machine_of
from gmemd.errors import QmpError

CPU_MODELS = ("max", "host", "qemu64")
# The features of qemu64, which every model here has.
_FEATURES = """fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 sse3 cx16
               syscall nx lm svm"""

# The options that are honoured, with their parameters.
OPTIONS: dict[str, dict[str, str]] = {
    "machine": {"type": "string", "accel": "string", "memory-backend": "string", "dump-guest-core": "boolean",
                "acpi": "boolean", "usb": "boolean", "hpet": "boolean"},
    "memory": {"size": "size", "slots": "number", "maxmem": "size"},
    "smp-opts": {"cpus": "number", "maxcpus": "number", "sockets": "number", "dies": "number", "cores": "number",
                 "threads": "number"},
    "numa": {"type": "string", "nodeid": "number", "cpus": "string", "memdev": "string"},
    "object": {"qom-type": "string", "id": "string"},
    "device": {"driver": "string", "id": "string"},
    "chardev": {"backend": "string", "id": "string", "path": "string", "fd": "string", "server": "boolean",
                "wait": "boolean"},
    "mon": {"mode": "string", "chardev": "string", "pretty": "boolean"},
    "name": {"guest": "string", "process": "string", "debug-threads": "boolean"},
    "action": {"reboot": "string", "shutdown": "string", "panic": "string", "watchdog": "string"},
}


def query_kvm(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> dict[str, Any]:
    kvm = machine_of(gmemd).kvm
    return {"enabled": kvm, "present": kvm or gmemd.kernel.kvm_present}


def query_target(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"arch": "x86_64"}


def query_machines(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> list[Any]:
    rows = []
    for kind in MACHINES:
        row = {"name": kind.name, "cpu-max": kind.cpu_max, "hotpluggable-cpus": kind.is_pc,
               "numa-mem-supported": False, "deprecated": False, "default-ram-id": kind.ram_id, "acpi": kind.is_pc}
        if kind.is_pc:
            row |= {"alias": kind.alias, "default-cpu-type": CPU_TYPE}
        if kind is MACHINES[0]:
            row["is-default"] = True
        rows.append(row)
    return rows


def query_cpus_fast(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> list[Any]:
    return machine_of(gmemd).cpus()


def query_hotpluggable_cpus(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> list[Any]:
    machine = machine_of(gmemd)
    if not machine.kind.is_pc:
        raise QmpError("machine does not support hot-plugging CPUs")
    return machine.cpu_places()


def query_cpu_definitions(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> list[Any]:
    return [{"name": name, "typename": f"{name}-x86_64-cpu", "unavailable-features": [], "static": False,
             "migration-safe": name == "qemu64", "deprecated": False} for name in _models(gmemd)]


def query_cpu_model_expansion(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> dict[str, Any]:
    model = arguments["model"]
    if model["name"] not in _models(gmemd):
        raise QmpError(f"The CPU model '{model['name']}' is unknown.")
    features = dict.fromkeys(_FEATURES.split(), True)
    return {"model": {"name": model["name"], "props": features | model.get("props", {})}}


def _models(gmemd: Gmemd) -> tuple[str, ...]:
    return tuple(name for name in CPU_MODELS if name != "host" or machine_of(gmemd).kvm)


def query_command_line_options(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> list[Any]:
    wanted = arguments.get("option")
    if wanted is not None and wanted not in OPTIONS:
        raise QmpError(f"invalid option name: {wanted}")
    return [{"option": option, "parameters": [{"name": name, "type": kind} for name, kind in parameters.items()]}
            for option, parameters in OPTIONS.items() if wanted in (None, option)]


def device_list_properties(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> list[Any]:
    if arguments["typename"] in DEVICES:
        return DEVICES[arguments["typename"]].properties
    return qom.device_list_properties(gmemd, caller, arguments)


# -- character and block devices


def query_chardev(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> list[Any]:
    line = machine_of(gmemd).line
    used = {monitor.chardev for monitor in line.monitors}
    return [{"label": label, "filename": chardev.filename, "frontend-open": label in used}
            for label, chardev in line.chardevs.items()]


def query_block(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> list[Any]:
    return []


query_blockstats = query_named_block_nodes = query_iothreads = query_block


# -- migration


def query_migrate_capabilities(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> list[Any]:
    switched = machine_of(gmemd).capabilities
    names = gmemd.schema.document["$defs"]["MigrationCapability"]["enum"]
    return [{"capability": name, "state": switched.get(name, False)} for name in names]


def migrate_set_capabilities(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> dict[str, Any]:
    change.judged()
    machine_of(gmemd).capabilities |= {entry["capability"]: entry["state"] for entry in arguments["capabilities"]}
    return {}


def query_migrate(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> dict[str, Any]:
    return {}
