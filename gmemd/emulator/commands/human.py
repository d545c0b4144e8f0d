"""human-monitor-command: the few commands of QEMU's human monitor that are about memory and the machine."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from gmemd.changes.change import Change, changing
from gmemd.commands.context import Caller, Gmemd
from gmemd.emulator.commands import memory, runstate, system
from gmemd.emulator.tree import machine_of
from gmemd.errors import QmpError

END = "\r\n"

_DEVICE_LINES = {
    "dimm": ("addr", "slot", "node", "size", "memdev", "hotplugged", "hotpluggable"),
    "virtio-mem": ("memaddr", "node", "requested-size", "size", "max-size", "block-size", "memdev"),
}


def human_monitor_command(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any], change: Change) -> str:
    change.judged()
    words = arguments["command-line"].split()
    if not words:
        return ""
    if words[0] in ("help", "?"):
        return _help(" ".join(words[1:]))
    name = " ".join(words[:2] if words[0] == "info" else words[:1])
    found = _COMMANDS.get(name)
    if found is None:
        return f"unknown command: '{name}'{END}"
    try:
        return "".join(line + END for line in found[1](gmemd, caller))
    except QmpError as exc:
        return f"Error: {exc.desc}{END}"


def _help(name: str) -> str:
    return "".join(f"{command}  -- {text}{END}" for command, (text, _) in _COMMANDS.items()
                   if name in ("", command) or command.startswith(f"{name} "))


def _info(gmemd: Gmemd, caller: Caller) -> list[str]:
    return [f"{command}  -- {text}" for command, (text, _) in _COMMANDS.items() if command.startswith("info ")]


def _memdev(gmemd: Gmemd, caller: Caller) -> list[str]:
    lines = []
    for backend in gmemd.objects:
        own = backend.properties
        lines += [f"memory backend: {backend.id}", f"  size:  {backend.size}"]
        lines += [f"  {name}: {_word(own[name])}" for name in ("merge", "dump", "prealloc", "share", "reserve")]
        lines += [f"  policy: {own['policy']}", f"  host nodes: {','.join(map(str, own['host-nodes']))}"]
    return [*lines, ""]


def _memory_devices(gmemd: Gmemd, caller: Caller) -> list[str]:
    lines = []
    for entry in memory.query_memory_devices(gmemd, caller, {}):
        data = dict(entry["data"])
        lines.append(f'Memory device [{entry["type"]}]: "{data.pop("id", "")}"')
        lines += [f"  {name}: {data[name]:#x}" if "addr" in name else f"  {name}: {_word(data[name])}"
                  for name in _DEVICE_LINES[entry["type"]]]
    return lines


def _summary(gmemd: Gmemd, caller: Caller) -> list[str]:
    sizes = memory.query_memory_size_summary(gmemd, caller, {})
    return [f"base memory: {sizes['base-memory']}", f"plugged memory: {sizes['plugged-memory']}"]


def _version(gmemd: Gmemd, caller: Caller) -> list[str]:
    qemu = gmemd.version["qemu"]
    return [f"{qemu['major']}.{qemu['minor']}.{qemu['micro']}{gmemd.version['package']}"]


def _status(gmemd: Gmemd, caller: Caller) -> list[str]:
    status = machine_of(gmemd).status
    return ["VM status: running" if status == "running" else
            "VM status: paused" + ("" if status == "paused" else f" ({status})")]


def _kvm(gmemd: Gmemd, caller: Caller) -> list[str]:
    kvm = system.query_kvm(gmemd, caller, {})
    return ["kvm support: " + ("enabled" if kvm["enabled"] else "disabled" if kvm["present"] else "not compiled")]


def _numa(gmemd: Gmemd, caller: Caller) -> list[str]:
    machine = machine_of(gmemd)
    devices = [entry["data"] for entry in memory.query_memory_devices(gmemd, caller, {})]
    rows = machine.numa_rows()
    lines = [f"{len(rows)} nodes"]
    for number, cpus, size in rows:
        plugged = sum(data["size"] for data in devices if data["node"] == number)
        lines += [f"node {number} cpus:{''.join(f' {cpu}' for cpu in cpus)}",
                  f"node {number} size: {(size + plugged) >> 20} MB", f"node {number} plugged: {plugged >> 20} MB"]
    return lines


def _cpus(gmemd: Gmemd, caller: Caller) -> list[str]:
    return [f"{'*' if cpu['cpu-index'] == 0 else ' '} CPU #{cpu['cpu-index']}: thread_id={cpu['thread-id']}"
            for cpu in machine_of(gmemd).cpus()]


def _balloon(gmemd: Gmemd, caller: Caller) -> list[str]:
    return [f"balloon: actual={memory.query_balloon(gmemd, caller, {})['actual'] >> 20}"]


def _as_qmp(command: Callable[[Gmemd, Caller, dict[str, Any], Change], Any]) -> Callable[[Gmemd, Caller], list[str]]:
    """A command without arguments and output, as over QMP."""
    def run(gmemd: Gmemd, caller: Caller) -> list[str]:
        result = changing(gmemd.settler, command)(gmemd, caller, {})
        if isinstance(result, Coroutine):
            gmemd.spawn(result)
        return []

    return run


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


_COMMANDS: dict[str, tuple[str, Callable[[Gmemd, Caller], list[str]]]] = {
    "cont": ("resume emulation", _as_qmp(runstate.cont)),
    "help": ("show the help", lambda gmemd, caller: []),
    "info": ("show what can be shown", _info),
    "info balloon": ("show balloon information", _balloon),
    "info cpus": ("show infos for each CPU", _cpus),
    "info kvm": ("show KVM information", _kvm),
    "info memdev": ("show memory backends", _memdev),
    "info memory-devices": ("show memory devices", _memory_devices),
    "info memory_size_summary": ("show the amount of initially allocated and present hotpluggable memory in bytes",
                                 _summary),
    "info name": ("show the current VM name", lambda gmemd, caller: [gmemd.name] if gmemd.name else []),
    "info numa": ("show NUMA information", _numa),
    "info status": ("show the current VM status (running|paused)", _status),
    "info uuid": ("show the current VM UUID",
                  lambda gmemd, caller: [gmemd.uuid or "00000000-0000-0000-0000-000000000000"]),
    "info version": ("show the version of QEMU", _version),
    "stop": ("stop emulation", _as_qmp(runstate.stop)),
    "system_powerdown": ("send system power down event", _as_qmp(runstate.system_powerdown)),
    "system_reset": ("reset the system", _as_qmp(runstate.system_reset)),
}
