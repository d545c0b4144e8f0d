"""Clients of one gmemd inside the test's own event loop, and a command that takes as long as the test wants."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from types import ModuleType
from typing import Any

from gmemd.commands.context import Gmemd
from gmemd.commands.dispatch import MODULES, Dispatcher
from gmemd.kernel.choose import choose_kernel
from gmemd.qmp.session import Event
from gmemd.schema.validate import Schema
from gmemd.server.monitor import Monitor
from gmemd.server.users import User, Users
from tests.doors import Doors

SECONDS = 30.0


class Client:
    """One client: its monitor, and its end of the connection."""

    def __init__(self, hub: Hub, *, pretty: bool = False) -> None:
        here, self.sock = socket.socketpair()
        here.setblocking(False)
        self.sock.setblocking(False)
        self._data = b""
        self.fds: list[int] = []  # received
        self.monitor = Monitor(hub.loop, here, hub.dispatcher, pretty=pretty,
                               closed=hub.monitors.discard, users=hub.users)
        hub.monitors.add(self.monitor)

    def send(self, command: str, *fds: int, execute: str = "execute", **arguments: Any) -> None:
        """Send a command, its arguments with underscores for hyphens, and descriptors with it."""
        request = {execute: command, "arguments": {name.replace("_", "-"): arguments[name] for name in arguments}}
        socket.send_fds(self.sock, [json.dumps(request).encode()], fds)

    async def send_bytes(self, data: bytes) -> None:
        """Send bytes, however long it takes."""
        await asyncio.wait_for(asyncio.get_running_loop().sock_sendall(self.sock, data), SECONDS)

    async def message(self) -> dict[str, Any]:
        """The next message; EOFError when the connection is closed."""
        async with asyncio.timeout(SECONDS):
            while b"\n" not in self._data:
                try:
                    data, fds, _, _ = socket.recv_fds(self.sock, 1 << 16, 253)
                except BlockingIOError:
                    await asyncio.sleep(0.001)
                    continue
                if not data:
                    raise EOFError
                self._data += data
                self.fds += fds
        line, _, self._data = self._data.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    async def text(self, count: int) -> bytes:
        """So many messages of a client with pretty=on, as they are written."""
        data = b""
        async with asyncio.timeout(SECONDS):
            while data.count(b"\r\n}\r\n") < count:
                data += await asyncio.get_running_loop().sock_recv(self.sock, 1 << 16)
        return data

    async def do(self, command: str, *fds: int, **arguments: Any) -> Any:
        """What a command returns; its error if it fails."""
        self.send(command, *fds, **arguments)
        message = await self.message()
        return message["return"] if "return" in message else message["error"]["desc"]

    def has_message(self) -> bool:
        """Whether something is there to be read."""
        try:
            return bool(self._data or self.sock.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return False


class Hub(Doors):
    """A gmemd and its clients. `query-name` ends when `go` is set."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.users = Users(self.loop)
        self.go = asyncio.Event()
        self.monitors: set[Monitor] = set()
        self.clients: list[Client] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.begun = 0  # long commands
        self.gmemd = Gmemd(schema=Schema.load(), kernel=choose_kernel("simulated"),
                           version={"qemu": {"major": 11, "minor": 1, "micro": 0}, "package": "test"}, host=self)
        self.dispatcher = Dispatcher(self.gmemd, (*MODULES, self._slow()))

    def _slow(self) -> ModuleType:
        async def wait() -> dict[str, str]:
            await self.go.wait()
            return {"name": "slow"}

        def query_name(gmemd: Gmemd, caller: Any, arguments: dict[str, Any]) -> Any:
            return wait()

        module = ModuleType("slow")
        query_name.__module__ = "slow"
        module.query_name = query_name  # type: ignore[attr-defined]
        return module

    @property
    def user(self) -> User:
        """Whom all the clients are counted for."""
        return self.users.find(f"uid:{os.getuid()}", {})

    def emit(self, name: str, data: dict[str, Any]) -> None:
        self.emit_in(self.gmemd, name, data)

    def emit_in(self, room: Gmemd, name: str, data: dict[str, Any]) -> None:
        event = Event(name, data, 0.0)
        for monitor in self.monitors:
            if monitor.room is room:
                monitor.emit(event)

    def spawn(self, work: Any) -> None:
        self.begun += 1
        task = self.loop.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def stop(self) -> None: ...

    async def client(self, *enable: str) -> Client:
        """A client that has negotiated."""
        client = Client(self)
        self.clients.append(client)
        await client.message()
        assert await client.do("qmp_capabilities", enable=list(enable)) == {}
        return client

    async def until(self, condition: Any) -> None:
        """Wait until something holds."""
        async with asyncio.timeout(SECONDS):
            while not condition():
                await asyncio.sleep(0.001)

    async def close(self) -> None:
        """End everything."""
        self.go.set()
        for client in self.clients:
            client.monitor.close()
            client.sock.close()
        async with asyncio.timeout(SECONDS):
            while self.tasks:
                await asyncio.sleep(0.001)
        self.gmemd.close()
