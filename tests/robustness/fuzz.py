"""Fuzzing: a stream of messages against parser, session, schema and every command but quit, in this process.

An input is what one client sends. Whatever it is, it must be cut into the same messages in one piece and in two, each
message must have one answer that is JSON and not "internal error", and the next client finds a gmemd that answers.
What would run in the background is begun and not awaited; paths are refused, as by a policy without roots.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import warnings
from collections.abc import Coroutine, Iterator
from pathlib import Path
from types import CoroutineType
from typing import Any

from gmemd.authority.rights import Rights, Role
from gmemd.changes.change import Change, WithFds
from gmemd.changes.threads import close_beside
from gmemd.commands.context import Gmemd
from gmemd.commands.dispatch import Dispatcher
from gmemd.errors import QmpError, close_fd
from gmemd.kernel.choose import choose_kernel
from gmemd.objects.fds import NamedFds
from gmemd.qmp.session import NO_ID, Request, Session
from gmemd.schema.validate import Schema
from tests.robustness.world import Wrong

CORPUS = Path(__file__).with_name("corpus.txt")  # an input a line, in base64
LONGEST = 4096  # bytes of an input
_INPUTS = 500  # that one gmemd is given
_VERSION = {"qemu": {"major": 11, "minor": 1, "micro": 0}, "package": "fuzz"}


class Host:
    """A gmemd's host and only client."""

    def __init__(self, schema: Schema) -> None:
        self.gmemd = Gmemd(schema=schema, kernel=choose_kernel("simulated"), version=_VERSION, host=self)
        self.dispatcher = Dispatcher(self.gmemd)
        self.rights = Rights(Role.ADMIN, commands=frozenset(schema.commands) - {"quit"}, paths=())
        self.usable = self.dispatcher.usable(self.rights)
        self.uid, self.pid = os.getuid(), os.getpid()
        self.named_fds = NamedFds()
        self.room = self.gmemd
        self.budget = None

    def connect(self) -> None:
        self.session = Session(_VERSION)
        close_beside(self.named_fds.take_all())

    def emit(self, name: str, data: dict[str, Any]) -> None:
        json.dumps(data)

    def stop(self) -> None:
        raise Wrong("it would stop")

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        work.close()

    def is_gone(self) -> bool:
        return False

    def take_fd(self) -> int:
        fd = os.memfd_create("fuzz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.truncate(fd, 8192)
        return fd

    def close(self) -> None:
        close_beside(self.named_fds.take_all())
        self.gmemd.close()


class Target:
    """What inputs are tried on; `messages` counts."""

    def __init__(self) -> None:
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        self.messages = 0
        self._schema = Schema.load()
        self._host = Host(self._schema)
        self._left = _INPUTS

    async def once(self, data: bytes) -> None:
        """Try one input; Wrong, or the exception that escaped."""
        self._left -= 1
        if not self._left:
            self._host.close()
            self._host, self._left = Host(self._schema), _INPUTS
        self._host.connect()
        middle = data[-1] * len(data) // 256 if data else 0
        whole, halves = list(_requests(data)), list(_requests(data[:middle], data[middle:]))
        if list(map(_told, whole)) != list(map(_told, halves)):
            raise Wrong(f"cut at {middle} these are other messages")
        for request in whole:
            self.messages += 1
            self._answer(request)
        ping = self._host.dispatcher.run(Request("query-status", {}, NO_ID), _negotiated(), self._host)
        if not ping:
            raise Wrong("query-status has no answer")
        await asyncio.sleep(0)

    def _answer(self, request: Request) -> None:
        session = self._host.session
        try:
            result = self._host.dispatcher.run(request, session, self._host)
        except QmpError as exc:
            reply = session.failure(request, exc)
        else:
            reply = session.success(request, _value(result))
        answer = json.loads(reply)
        if ("return" in answer) == ("error" in answer) or "internal error" in str(answer.get("error", "")):
            raise Wrong(f"answered by {answer}")
        if "id" in answer and request.id is NO_ID:
            raise Wrong(f"an id of its own: {answer}")

    def close(self) -> None:
        self._host.close()


def _value(result: Any) -> Any:
    if isinstance(result, Change):
        return result.value
    if isinstance(result, WithFds):
        for fd in result.fds:
            close_fd(fd)
        return result.value
    if isinstance(result, CoroutineType):
        result.close()
        return {}
    return result


def _requests(*chunks: bytes) -> Iterator[Request]:
    """What a client has sent, as requests."""
    session = Session(_VERSION)
    for chunk in chunks:
        if chunk:
            session.feed(chunk)
        while (request := session.next_request()) is not None:
            yield request


def _told(request: Request) -> tuple[Any, ...]:
    return request.execute, repr(request.arguments), repr(request.id), request.oob, str(request.error)


def _negotiated() -> Session:
    session = Session(_VERSION)
    session.negotiate([])
    return session


def seeds(schema: Schema) -> Iterator[bytes]:
    """An input for each command, with each of its arguments."""
    yield b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}{"exec-oob": "yank", "id": [1.5, null]}'
    add = {"execute": "object-add", "arguments": {"qom-type": "memory-backend-memfd", "id": "m", "size": 8192}}
    for name, command in schema.commands.items():
        arguments = {member: ["m", 4096, True, {"a": 1}, ["m"]][number % 5]
                     for number, member in enumerate(schema.document["$defs"][command.arguments].get("properties", {}))}
        yield "\n".join(map(json.dumps, (
            {"execute": "qmp_capabilities"}, add, {"execute": "getfd", "arguments": {"fdname": "m"}},
            {"execute": name, "arguments": {**arguments, "id": "m"}, "id": 1},
            {"execute": name, "arguments": dict.fromkeys(arguments, "m")},
            {"execute": "object-del", "arguments": {"id": "m"}}))).encode()


def corpus() -> list[bytes]:
    """What earlier runs have found, one input for each path that no shorter one takes."""
    return [base64.b64decode(line) for line in CORPUS.read_text().splitlines()] if CORPUS.exists() else []
