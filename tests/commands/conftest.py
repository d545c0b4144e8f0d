"""A gmemd without sockets: its commands run by name, on the simulated kernel, nothing kept."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest

from gmemd.authority.ledger import Budget
from gmemd.authority.rights import ALL, Rights, Role
from gmemd.commands.context import Gmemd
from gmemd.commands.dispatch import MODULES, Dispatcher
from gmemd.errors import QmpError
from gmemd.kernel.choose import choose_kernel
from gmemd.kernel.kernel import Kernel
from gmemd.kernel.program import worker_program
from gmemd.objects.fds import NamedFds
from gmemd.qmp.rows import Pieces
from gmemd.qmp.session import Request, Session
from gmemd.schema.validate import Schema
from tests.doors import Doors
from tests.patience import wait_for


class Machine(Doors):
    """Runs commands as one client; fds in `sent` are what came by SCM_RIGHTS."""

    def __init__(self, kernel: str | Kernel = "simulated", *, modules: Sequence[ModuleType] = MODULES,
                 **parts: Any) -> None:
        parts.setdefault("schema", Schema.load())
        self.gmemd = Gmemd(kernel=choose_kernel(kernel) if isinstance(kernel, str) else kernel, host=self,
                           version={"qemu": {"major": 11, "minor": 1, "micro": 0}, "package": "test"}, **parts)
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.dispatcher = Dispatcher(self.gmemd, modules)
        self.rights = ALL
        self.usable = self.dispatcher.usable(ALL)
        self.session = Session(self.gmemd.version)
        self.session.negotiate([])
        self.uid, self.pid = os.getuid(), os.getpid()
        self.sent: list[int] = []
        self.named_fds = NamedFds()
        self.budget: Budget | None = None
        self.gone = False
        self.room = self.gmemd

    def become(self, tenant: int | None) -> None:
        """Be a tenant from now on, or one who sees all."""
        role = Role.ADMIN if tenant is None else Role.TENANT
        room = None if tenant is None else str(tenant)
        self.rights = Rights(role, room=room)
        self.uid = os.getuid() if tenant is None else tenant
        self.room = self.gmemd.room_of(room)
        self.usable = self.dispatcher.usable(self.rights)

    def emit(self, name: str, data: dict[str, Any]) -> None:
        self.events.append((name, data))

    def emit_in(self, room: Gmemd, name: str, data: dict[str, Any]) -> None:
        self.emit(f"{room.tenant}: {name}", data)

    def stop(self) -> None: ...

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        raise AssertionError("nothing goes on after its reply here")

    def is_gone(self) -> bool:
        return self.gone

    def take_fd(self) -> int:
        if not self.sent:
            raise QmpError("No file descriptor supplied via SCM_RIGHTS")
        return self.sent.pop(0)

    def run(self, command: str, /, **arguments: Any) -> Any:
        """The result of a command; its arguments with underscores for hyphens."""
        return self.execute(command, {name.replace("_", "-"): value for name, value in arguments.items()})

    def begin(self, command: str, arguments: dict[str, Any]) -> Any:
        """Run a command as far as it does not wait: its result, or a coroutine that gives it."""
        return self.dispatcher.run(Request(command, arguments, None), self.session, self)

    def execute(self, command: str, arguments: dict[str, Any]) -> Any:
        result = self.begin(command, arguments)
        if asyncio.iscoroutine(result):
            result = asyncio.run(_wait(result))
        return b"".join(result) if isinstance(result, Pieces) else result

    def refusal(self, command: str, /, **arguments: Any) -> tuple[str, str]:
        """The class and sentence with which a command is refused."""
        with pytest.raises(QmpError) as caught:
            self.run(command, **arguments)
        return caught.value.error_class, caught.value.desc


async def _wait(work: Any) -> Any:
    result = await work
    for _ in range(3):  # a worker's pipes are closed in later turns of the loop
        await asyncio.sleep(0)
    return result


@pytest.fixture
def machine() -> Iterator[Machine]:
    """A machine that has given every fd back in the end."""
    worker_program()  # whose files stay open, as in a daemon
    before = set(os.listdir("/proc/self/fd"))
    made = Machine()
    yield made
    made.gmemd.close()
    wait_for(lambda: set(os.listdir("/proc/self/fd")) == before)  # what is closed off the loop, soon
