"""The emulator's process: a daemon without persistence, around which a machine is built before it listens."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Mapping

from gmemd.commands.context import Gmemd
from gmemd.commands.dispatch import MODULES, Dispatcher
from gmemd.daemon import Daemon, Options
from gmemd.emulator.commandline import CommandLine
from gmemd.emulator.commands import human, memory, runstate, system
from gmemd.emulator.domain import Domain
from gmemd.emulator.guest import obey
from gmemd.emulator.machine import Machine
from gmemd.emulator.plug import plug
from gmemd.emulator.tree import machine_of, mount
from gmemd.errors import QmpError
from gmemd.persist.manager import Manager


class Emulator(Daemon):
    """One running gmemd-emulator; `ready` is called once its monitors listen."""

    document = "emulator.json"
    names_stay = True

    def __init__(self, line: CommandLine, environ: Mapping[str, str], ready: Callable[[], None]) -> None:
        options = Options(qmp=(), kernel=environ.get("GMEMD_KERNEL", "auto"), persist="off", name=line.name,
                          uuid=line.uuid)
        super().__init__(options, Manager.from_environ({}))
        self._line = line
        self._socket_path = environ.get("GMEMD_SOCKET", "")
        self._tell_ready = ready

    def _make_gmemd(self) -> Gmemd:
        gmemd = super()._make_gmemd()
        put_machine(gmemd, self._line, self._socket_path)
        return gmemd

    def _make_dispatcher(self) -> Dispatcher:
        return make_dispatcher(self._gmemd)

    async def _make_objects(self, dispatcher: Dispatcher) -> None:
        await build(dispatcher, self._line)

    def _listen(self, dispatcher: Dispatcher, passed: list[socket.socket]) -> None:
        for monitor in self._line.monitors:
            sock, remove = self._line.chardevs[monitor.chardev].listen()
            self._serve(dispatcher, sock, pretty=monitor.pretty, remove=remove)
            if remove:
                self._listeners[-1].path = os.path.abspath(self._listeners[-1].path)  # -daemonize moves to /

    def _hang_up(self) -> None:
        self._gmemd.shutdown("host-signal")  # as QEMU

    def _ready(self) -> None:
        self._tell_ready()


def put_machine(gmemd: Gmemd, line: CommandLine, socket_path: str) -> None:
    """Put the machine of a command line around a gmemd whose schema is emulator.json; `socket_path` is GMEMD_SOCKET."""
    dump, merge = (line.machine.get(name, "on") != "off" for name in ("dump-guest-core", "mem-merge"))
    gmemd.schema.set_defaults(dump=dump, merge=merge)
    mount(Machine(gmemd, line, Domain(socket_path, line.uuid, line.name) if socket_path else None))


def make_dispatcher(gmemd: Gmemd) -> Dispatcher:
    """The commands of gmemd and of the machine."""
    return Dispatcher(gmemd, (*MODULES, runstate, system, memory, human))


async def build(dispatcher: Dispatcher, line: CommandLine) -> None:
    """Make objects, then the machine's memory, then devices, as QEMU does whatever the order of the words."""
    gmemd = dispatcher.gmemd
    machine = machine_of(gmemd)
    machine.status = "starting"
    for properties in line.objects:
        await dispatcher.at_start("object-add", properties)
    for object_id in machine.ram_ids():
        if gmemd.objects.get(object_id) is None:
            ram = {"qom-type": "memory-backend-ram", "id": object_id, "size": machine.base_memory}
            await dispatcher.at_start("object-add", ram)
        machine.take(object_id)
    for option in line.devices:
        with _named(option.where):
            plug(machine, option.properties, hotplugged=False, text=option.text)
    machine.status = "prelaunch" if line.paused else "running"
    for step in obey(machine):
        await step


@contextlib.contextmanager
def _named(option: str) -> Iterator[None]:
    """Put the option in front of a refusal."""
    try:
        yield
    except QmpError as exc:
        raise QmpError(f"{option}: {exc.desc}", exc.error_class) from exc
