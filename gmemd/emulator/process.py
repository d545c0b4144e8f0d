"""The emulator's process: a daemon without persistence, with a machine that is built before it listens."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping

from gmemd.authority.gate import Gate
from gmemd.commands.context import Gmemd
from gmemd.commands.dispatch import MODULES, Dispatcher
from gmemd.daemon import Daemon, Options
from gmemd.emulator.commandline import CommandLine
from gmemd.emulator.commands import human, memory, runstate, system
from gmemd.emulator.domain import Domain
from gmemd.emulator.guest import obey
from gmemd.emulator.machine import Machine
from gmemd.emulator.plug import plug
from gmemd.emulator.tree import mount
from gmemd.errors import QmpError
from gmemd.objects.fds import NamedFds
from gmemd.persist.manager import Manager
from gmemd.server.doors import Listening


class Emulator:
    """The program of gmemd-emulator; `ready` is called once its monitors listen."""

    modules = (*MODULES, runstate, system, memory, human)

    def __init__(self, line: CommandLine, socket_path: str, ready: Callable[[], None]) -> None:
        """`socket_path` is GMEMD_SOCKET."""
        self._line = line
        self._socket_path = socket_path
        self.schema = line.schema
        self.gate: Gate | None = None
        self.ready = ready

    async def build(self, dispatcher: Dispatcher) -> None:
        """Create the machine, objects, its memory, then devices, like QEMU, whatever the order of the options."""
        gmemd, line = dispatcher.gmemd, self._line
        dump, merge = (line.machine.get(name, "on") != "off" for name in ("dump-guest-core", "mem-merge"))
        gmemd.schema.set_defaults(dump=dump, merge=merge)
        domain = Domain(self._socket_path, line.uuid, line.name) if self._socket_path else None
        machine = Machine(gmemd, line, domain)
        mount(machine)
        machine.status = "starting"
        for properties in line.objects:
            await dispatcher.at_start("object-add", properties)
        for object_id in machine.ram_ids():
            if gmemd.objects.get(object_id) is None:
                ram = {"qom-type": "memory-backend-ram", "id": object_id, "size": machine.base_memory}
                await dispatcher.at_start("object-add", ram)
            machine.take(object_id)
        for option in line.devices:
            try:
                plug(machine, option.properties, hotplugged=False, text=option.text)
            except QmpError as exc:
                raise QmpError(f"{option.where}: {exc.desc}", exc.error_class) from exc
        machine.status = "prelaunch" if line.paused else "running"
        for step in obey(machine):
            await step

    def sockets(self, passed: list[socket.socket]) -> Iterator[Listening]:
        for monitor in self._line.monitors:
            sock, remove = self._line.chardevs[monitor.chardev].listen()
            yield Listening(sock, monitor.pretty, remove, NamedFds())  # whose names are those of a socket, as in QEMU

    def hang_up(self, gmemd: Gmemd) -> None:
        gmemd.shutdown("host-signal")  # as QEMU


def make_emulator(line: CommandLine, environ: Mapping[str, str], ready: Callable[[], None]) -> Daemon:
    """The daemon that runs it, which keeps nothing."""
    options = Options(qmp=(), kernel=environ.get("GMEMD_KERNEL", "auto"), persist="off", name=line.name, uuid=line.uuid)
    return Daemon(options, Manager({}), Emulator(line, environ.get("GMEMD_SOCKET", ""), ready))
