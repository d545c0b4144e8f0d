"""What a command line of QEMU asks for, as far as it concerns the memory, the monitors and the process.

The rest is kept in `CommandLine.words` and means nothing.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from gmemd.emulator.argv import Pairs, options
from gmemd.emulator.created import DeviceOption, device_of, object_of
from gmemd.emulator.topology import Cpus, NumaNode, cpus_of, numa_node_of
from gmemd.errors import QmpError
from gmemd.schema.validate import Schema

MIB = 1 << 20
DEFAULT_RAM = 128 * MIB
_RAM_UNIT = 8192  # bytes
_PAGE = 4096  # bytes of the guest
_SLOTS_MAX = 256

_FD = re.compile(r"[0-9]+")


@dataclass(frozen=True)
class Ram:
    """-m: bytes at the start, slots for dimms, bytes at most (0: no more than at the start)."""

    size: int = DEFAULT_RAM
    slots: int = 0
    most: int = 0
    given: bool = False

    def check_board(self) -> None:
        """Refuse what a PC cannot have."""
        if self.slots > _SLOTS_MAX:
            raise QmpError(f"unsupported amount of memory slots: {self.slots}")
        if self.most % _PAGE:
            raise QmpError(f"maximum memory size must by aligned to multiple of {_PAGE} bytes")


@dataclass(frozen=True)
class Chardev:
    """One -chardev: for a socket where it listens, a path or an inherited descriptor."""

    label: str
    backend: str
    path: str = ""
    fd: int = -1

    @property
    def filename(self) -> str:
        """What query-chardev tells of it."""
        if self.backend == "socket":
            return f"unix:{self.path},server=on"
        return f"{self.backend}:{self.path}" if self.path else self.backend


@dataclass(frozen=True)
class MonitorOption:
    """A QMP monitor: the chardev that it speaks on."""

    chardev: str
    pretty: bool = False


@dataclass
class CommandLine:
    """What was asked for."""

    words: list[str]
    machine: dict[str, str] = field(default_factory=dict)  # properties, `type` among them
    accels: list[str] = field(default_factory=list)
    ram: Ram = field(default_factory=Ram)
    cpus: Cpus = field(default_factory=Cpus)
    numa: list[NumaNode] = field(default_factory=list)
    objects: list[dict[str, Any]] = field(default_factory=list)  # properties, as object-add takes them
    devices: list[DeviceOption] = field(default_factory=list)
    chardevs: dict[str, Chardev] = field(default_factory=dict)
    monitors: list[MonitorOption] = field(default_factory=list)
    name: str | None = None
    uuid: str | None = None
    pidfile: str = ""
    no_acpi: bool = False
    paused: bool = False
    daemonize: bool = False
    shutdown_action: str = "poweroff"
    reboot_action: str = "reset"
    show: str = ""  # "help", "version" or "machine": print it and end
    help_text: str = ""  # print this and end
    warn: Callable[[str], None] = lambda text: None
    schema: Schema | None = None
    object_ids: set[str] = field(default_factory=set)  # of those written as key=value
    device_ids: set[str] = field(default_factory=set)


def parse(argv: Iterable[str], warn: Callable[[str], None] = lambda text: None) -> CommandLine:
    """Read a command line, as far as something is asked for that is printed; QmpError in QEMU's words if it is wrong.

    `warn` gets what is to be said though it is right.
    """
    words = list(argv)
    line = CommandLine(words, warn=warn)
    for name, value in options(words):
        read = _READERS.get(name)
        if read is not None:
            read(line, name, value)
        if line.show or line.help_text:
            return line
    for monitor in line.monitors:
        if monitor.chardev not in line.chardevs:
            raise QmpError(f'-mon chardev={monitor.chardev}: chardev "{monitor.chardev}" not found')
    return line


def _machine(line: CommandLine, option: str, value: str) -> None:
    for key, text in Pairs(option, value, "type").pairs:
        if key == "accel":
            line.accels = text.split(":")
        else:
            line.machine[key.replace("_", "-")] = text
    if line.machine.get("type") in ("help", "?"):
        line.show = "machine"


def _accel(line: CommandLine, option: str, value: str) -> None:
    line.accels.append(Pairs(option, value, "accel").needed("accel"))


def _memory(line: CommandLine, option: str, value: str) -> None:
    pairs = Pairs(option, value, "size", ("size", "slots", "maxmem"), line.warn)
    size = pairs.size("size", line.ram.size, unit=MIB) or DEFAULT_RAM
    ram = Ram(-(-size // _RAM_UNIT) * _RAM_UNIT, pairs.number("slots", line.ram.slots),
              pairs.size("maxmem", line.ram.most), True)
    if ram.slots and not ram.most:
        raise QmpError("slots specified but no max-size")
    if ram.most and ram.most < ram.size:
        raise QmpError(f"invalid value of maxmem: maximum memory size ({ram.most:#x}) must be at least the initial "
                       f"memory size ({ram.size:#x})")
    if ram.slots and ram.most == ram.size:
        raise QmpError(f"invalid value of maxmem: memory slots were specified but maximum memory size ({ram.most:#x}) "
                       f"is equal to the initial memory size ({ram.size:#x})")
    line.ram = ram


def _smp(line: CommandLine, option: str, value: str) -> None:
    line.cpus = cpus_of(Pairs(option, value, "cpus"))


def _numa(line: CommandLine, option: str, value: str) -> None:
    node = numa_node_of(Pairs(option, value, "type"), line.numa)
    if node is not None:
        line.numa.append(node)


def _object(line: CommandLine, option: str, value: str) -> None:
    """An object, or a monitor that is written as one (as libvirt 12 does)."""
    found = object_of(value, line.object_ids, line.warn, _schema(line))
    if isinstance(found, str):
        line.help_text = found
    elif found["qom-type"] == "monitor-qmp":
        line.monitors.append(MonitorOption(str(found.get("chardev", "")), found.get("pretty") in (True, "on")))
    else:
        line.objects.append(found)


def _schema(line: CommandLine) -> Schema:
    """What objects there can be; read when the first one is named."""
    if line.schema is None:
        line.schema = Schema.load("emulator.json")
    return line.schema


def _device(line: CommandLine, option: str, value: str) -> None:
    found = device_of(value, line.device_ids, line.warn)
    if isinstance(found, str):
        line.help_text = found
    else:
        line.devices.append(found)


def _chardev(line: CommandLine, option: str, value: str) -> None:
    pairs = Pairs(option, value, "backend", warn=line.warn)
    label, fd = pairs.needed("id"), pairs.text("fd")
    if label in line.chardevs:
        raise pairs.error(f"Duplicate ID '{label}' for chardev")
    if fd and not _FD.fullmatch(fd):
        raise pairs.error(f"Unable to parse FD number {fd}")
    line.chardevs[label] = Chardev(label, pairs.needed("backend"), pairs.text("path"), int(fd) if fd else -1)


def _mon(line: CommandLine, option: str, value: str) -> None:
    pairs = Pairs(option, value, "chardev", ("chardev", "id", "mode", "pretty"), line.warn)
    if pairs.text("mode", "readline") == "control":
        line.monitors.append(MonitorOption(pairs.needed("chardev"), pairs.flag("pretty")))
    elif pairs.needed("chardev") not in line.chardevs:
        raise pairs.error(f'chardev "{pairs.text("chardev")}" not found')


def _qmp(line: CommandLine, option: str, value: str) -> None:
    """unix:PATH with server=on: a chardev and a monitor in one."""
    if not value.startswith("unix:"):
        raise QmpError(f"-{option} {value}: only unix:PATH,server=on can be served")
    pairs = Pairs(option, "path=" + value.removeprefix("unix:"), "", ("path", "server", "wait"))
    if not pairs.flag("server"):
        raise QmpError(f"-{option} {value}: only unix:PATH,server=on can be served")
    label = f"compat_monitor{len(line.monitors)}"
    line.chardevs[label] = Chardev(label, "socket", pairs.text("path"))
    line.monitors.append(MonitorOption(label, option == "qmp-pretty"))


def _name(line: CommandLine, option: str, value: str) -> None:
    line.name = Pairs(option, value, "guest", ("guest", "process", "debug-threads"), line.warn).text("guest") or None


def _uuid(line: CommandLine, option: str, value: str) -> None:
    try:
        line.uuid = str(uuid.UUID(value))
    except ValueError as exc:
        raise QmpError(f"-{option} {value}: failed to parse UUID string: wrong format") from exc


def _action(line: CommandLine, option: str, value: str) -> None:
    pairs = Pairs(option, value, "", ("reboot", "shutdown", "panic", "watchdog"))
    line.reboot_action = pairs.text("reboot", line.reboot_action)
    line.shutdown_action = pairs.text("shutdown", line.shutdown_action)


def _set(name: str, value: Any) -> Any:
    """A reader of a flag."""
    return lambda line, option, text: setattr(line, name, value)


_READERS: dict[str, Any] = {
    "machine": _machine, "M": _machine, "accel": _accel, "m": _memory, "smp": _smp, "numa": _numa,
    "object": _object, "device": _device, "chardev": _chardev, "mon": _mon, "qmp": _qmp, "qmp-pretty": _qmp,
    "name": _name, "uuid": _uuid, "action": _action,
    "pidfile": lambda line, option, text: setattr(line, "pidfile", text),
    "S": _set("paused", True), "daemonize": _set("daemonize", True),
    "no-shutdown": _set("shutdown_action", "pause"), "no-reboot": _set("reboot_action", "shutdown"),
    "no-acpi": _set("no_acpi", True),
    "enable-kvm": lambda line, option, text: line.accels.append("kvm"),
    "help": _set("show", "help"), "h": _set("show", "help"), "version": _set("show", "version"),
}
