"""An emulator without sockets, and one as a process."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

import pytest

from gmemd.authority.rights import ALL
from gmemd.client.client import Client
from gmemd.commands.context import Gmemd
from gmemd.commands.dispatch import Dispatcher
from gmemd.daemon import QEMU_VERSION
from gmemd.emulator.commandline import parse
from gmemd.emulator.machine import Machine as EmulatedMachine
from gmemd.emulator.process import Emulator
from gmemd.emulator.tree import machine_of
from gmemd.errors import QmpError
from gmemd.kernel.choose import choose_kernel
from gmemd.objects.fds import NamedFds
from gmemd.qmp.session import Request, Session
from tests.daemon import Server
from tests.patience import PATIENCE

MIB = 1 << 20
PC = ("-machine", "pc", "-m", "size=64M,slots=2,maxmem=1G")


class Machine:
    """An emulator that runs commands as one client, inside a running event loop; its events are in `events`."""

    def __init__(self, *argv: str, kernel: str = "simulated", socket: str = "") -> None:
        self._line = parse(argv)
        self._socket = socket
        self.gmemd = Gmemd(schema=self._line.schema, kernel=choose_kernel(kernel), name=self._line.name,
                           uuid=self._line.uuid, version={"qemu": QEMU_VERSION, "package": "test"}, host=self)
        self.dispatcher = Dispatcher(self.gmemd, Emulator.modules)
        self.rights = ALL
        self.usable = self.dispatcher.usable(ALL)
        self.session = Session(self.gmemd.version)
        self.session.negotiate([])
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.stopped = False
        self.uid, self.pid = os.getuid(), os.getpid()
        self.named_fds = NamedFds()
        self.room = self.gmemd
        self.budget = None

    def emit(self, name: str, data: dict[str, Any]) -> None:
        self.events.append((name, data))

    def emit_in(self, room: Gmemd, name: str, data: dict[str, Any]) -> None:
        raise AssertionError("there are no rooms here")

    def stop(self) -> None:
        self.stopped = True

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        raise AssertionError("nothing goes on after its reply here")

    async def start(self) -> Machine:
        """Make objects, machine and devices of the command line; QmpError when that is refused."""
        await Emulator(self._line, self._socket, lambda: None).build(self.dispatcher)
        return self

    def is_gone(self) -> bool:
        return False

    @property
    def machine(self) -> EmulatedMachine:
        """What is around its memory."""
        return machine_of(self.gmemd)

    def take_fd(self) -> int:
        raise QmpError("No file descriptor supplied via SCM_RIGHTS")

    async def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """The result of a command."""
        result = self.dispatcher.run(Request(command, arguments or {}, None), self.session, self)
        return await result if asyncio.iscoroutine(result) else result

    async def run(self, command: str, /, **arguments: Any) -> Any:
        """The result of a command; its arguments with underscores for hyphens."""
        return await self.execute(command, {name.replace("_", "-"): value for name, value in arguments.items()})

    async def refusal(self, command: str, /, **arguments: Any) -> str:
        """The sentence with which a command is refused."""
        with pytest.raises(QmpError) as caught:
            await self.run(command, **arguments)
        return caught.value.desc

    async def wait_event(self, name: str) -> dict[str, Any]:
        """The first event of that name, now or soon."""
        async with asyncio.timeout(10):
            while True:
                for found, data in self.events:
                    if found == name:
                        return data
                await asyncio.sleep(0.001)

    def close(self) -> None:
        """Give everything back."""
        self.gmemd.close()


Start = Callable[..., Coroutine[Any, Any, Machine]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts an emulator on a command line, by default a PC with slots for dimms."""
    machines: list[Machine] = []

    async def start(*argv: str, **options: str) -> Machine:
        machine = Machine(*(argv or PC), **options)
        machines.append(machine)
        return await machine.start()

    yield start
    for machine in machines:
        machine.close()


async def refusal(start: Start, *argv: str) -> str:
    """The sentence with which a command line is refused."""
    with pytest.raises(QmpError) as caught:
        await start(*argv)
    return caught.value.desc


class Process(Server):
    """A gmemd-emulator of this tree, with a monitor on `sock`."""

    def __init__(self, *argv: str, env: dict[str, str] | None = None, pass_fds: Sequence[int] = ()) -> None:
        super().__init__([sys.executable, "-m", "gmemd.emulator.main", "-qmp", "{address},server=on,wait=off",
                          *argv], env=env, pass_fds=pass_fds)

    def client(self) -> Client:
        """Give a connected, negotiated client."""
        return Client(str(self.sock), timeout=PATIENCE)

    def check_end(self, status: int) -> None:
        log = self.log()
        assert log == "", log
        assert status == 0
