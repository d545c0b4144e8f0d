"""What a QEMU command line requests for the memory, the monitors and the process.

The rest is stored in `CommandLine.words` and has no effect.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from gmemd.emulator.argv import Pairs, options
from gmemd.emulator.created import DeviceOption, device_of, object_of
from gmemd.emulator.monitors import Chardev, MonitorOption, chardev_of, qmp_of
from gmemd.emulator.topology import Cpus, NumaNode, Ram, cpus_of, numa_node_of, ram_of
from gmemd.errors import QmpError
from gmemd.schema.keyval import Warn
from gmemd.schema.validate import Schema


@dataclass
class CommandLine:
    """The requested settings."""

    words: list[str]
    machine: dict[str, str] = field(default_factory=dict)  # properties, including `type`
    accels: list[str] = field(default_factory=list)
    ram: Ram = field(default_factory=Ram)
    cpus: Cpus = field(default_factory=Cpus)
    numa: list[NumaNode] = field(default_factory=list)
    objects: list[dict[str, Any]] = field(default_factory=list)  # properties, in the form of object-add
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
    show: str = ""  # print this and exit

    @cached_property
    def schema(self) -> Schema:
        """What commands and objects there are; read when the first object is named, or nothing is left to read."""
        return Schema.load("emulator.json")


def parse(argv: Iterable[str], warn: Warn = lambda text: None) -> CommandLine:
    """Read a command line, up to an option that only prints something; QmpError in QEMU's words if it is wrong.

    `warn` gets warnings.
    """
    words = list(argv)
    reader = _Reader(words, warn)
    line = reader.line
    for name, value in options(words):
        read = _OPTIONS.get(name)
        if read is not None:
            read(reader, name, value)
        if line.show:
            return line
    for monitor in line.monitors:
        if monitor.chardev not in line.chardevs:
            raise QmpError(f'-mon chardev={monitor.chardev}: chardev "{monitor.chardev}" not found')
    return line


class _Reader:
    """Reads one option after another into `line`."""

    def __init__(self, words: list[str], warn: Warn) -> None:
        self.line = CommandLine(words)
        self._warn = warn
        self._ids: set[tuple[str, str]] = set()  # option and id of those written as key=value

    def machine(self, option: str, value: str) -> None:
        line = self.line
        for key, text in Pairs(option, value, "type").pairs:
            if key == "accel":
                line.accels = text.split(":")
            else:
                line.machine[key.replace("_", "-")] = text
        if line.machine.get("type") in ("help", "?"):
            line.show = "machine"

    def accel(self, option: str, value: str) -> None:
        self.line.accels.append(Pairs(option, value, "accel").needed("accel"))

    def memory(self, option: str, value: str) -> None:
        self.line.ram = ram_of(Pairs(option, value, "size", ("size", "slots", "maxmem"), self._warn), self.line.ram)

    def smp(self, option: str, value: str) -> None:
        self.line.cpus = cpus_of(Pairs(option, value, "cpus"))

    def numa(self, option: str, value: str) -> None:
        node = numa_node_of(Pairs(option, value, "type"), self.line.numa)
        if node is not None:
            self.line.numa.append(node)

    def object(self, option: str, value: str) -> None:
        """An object, or a monitor that is written as one (as libvirt 12 does)."""
        found = object_of(value, self._ids, self._warn, self.line.schema)
        if isinstance(found, str):
            self.line.show = found
        elif found["qom-type"] == "monitor-qmp":
            self.line.monitors.append(MonitorOption(str(found.get("chardev", "")), found.get("pretty") in (True, "on")))
        else:
            self.line.objects.append(found)

    def device(self, option: str, value: str) -> None:
        found = device_of(value, self._ids, self._warn)
        if isinstance(found, str):
            self.line.show = found
        else:
            self.line.devices.append(found)

    def chardev(self, option: str, value: str) -> None:
        chardev = chardev_of(Pairs(option, value, "backend", warn=self._warn), self.line.chardevs)
        self.line.chardevs[chardev.label] = chardev

    def mon(self, option: str, value: str) -> None:
        pairs = Pairs(option, value, "chardev", ("chardev", "id", "mode", "pretty"), self._warn)
        if pairs.text("mode", "readline") == "control":
            self.line.monitors.append(MonitorOption(pairs.needed("chardev"), pairs.flag("pretty")))
        elif pairs.needed("chardev") not in self.line.chardevs:
            raise pairs.error(f'chardev "{pairs.text("chardev")}" not found')

    def qmp(self, option: str, value: str) -> None:
        """A chardev and a monitor in one."""
        chardev = qmp_of(option, value, f"compat_monitor{len(self.line.monitors)}")
        self.line.chardevs[chardev.label] = chardev
        self.line.monitors.append(MonitorOption(chardev.label, option == "qmp-pretty"))

    def name(self, option: str, value: str) -> None:
        pairs = Pairs(option, value, "guest", ("guest", "process", "debug-threads"), self._warn)
        self.line.name = pairs.text("guest") or None

    def uuid(self, option: str, value: str) -> None:
        try:
            self.line.uuid = str(uuid.UUID(value))
        except ValueError as exc:
            raise QmpError(f"-{option} {value}: failed to parse UUID string: wrong format") from exc

    def action(self, option: str, value: str) -> None:
        pairs = Pairs(option, value, "", ("reboot", "shutdown", "panic", "watchdog"))
        self.line.reboot_action = pairs.text("reboot", self.line.reboot_action)
        self.line.shutdown_action = pairs.text("shutdown", self.line.shutdown_action)


def _set(name: str, value: Any = None) -> Callable[[_Reader, str, str], None]:
    """A reader of a flag; without a value, of the option's own."""
    return lambda reader, option, text: setattr(reader.line, name, text if value is None else value)


_OPTIONS: dict[str, Callable[[_Reader, str, str], None]] = {
    "machine": _Reader.machine, "M": _Reader.machine, "accel": _Reader.accel, "m": _Reader.memory, "smp": _Reader.smp,
    "numa": _Reader.numa, "object": _Reader.object, "device": _Reader.device, "chardev": _Reader.chardev,
    "mon": _Reader.mon, "qmp": _Reader.qmp, "qmp-pretty": _Reader.qmp,
    "name": _Reader.name, "uuid": _Reader.uuid, "action": _Reader.action,
    "pidfile": _set("pidfile"), "S": _set("paused", True), "daemonize": _set("daemonize", True),
    "no-shutdown": _set("shutdown_action", "pause"), "no-reboot": _set("reboot_action", "shutdown"),
    "no-acpi": _set("no_acpi", True),
    "enable-kvm": lambda reader, option, text: reader.accel(option, "kvm"),
    "help": _set("show", "help"), "h": _set("show", "help"), "version": _set("show", "version"),
}
