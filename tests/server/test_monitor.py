"""One client among others: turns, and the flow control of one that does not read."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable
from unittest.mock import Mock

import pytest
import pytest_asyncio

from gmemd.commands.context import Gmemd
from gmemd.commands.dispatch import Dispatcher
from gmemd.kernel.choose import choose_kernel
from gmemd.schema.validate import Schema
from gmemd.server.monitor import Monitor
from gmemd.server.outgoing import HIGH_WATER
from gmemd.server.users import Users
from tests.patience import PATIENCE

NEGOTIATE = b'{"execute": "qmp_capabilities"}\n'
PING = b'{"execute": "query-version"}\n'

Connect = Callable[[], "tuple[Monitor, socket.socket]"]


@pytest_asyncio.fixture
async def connect() -> AsyncIterator[Connect]:
    """Makes clients of one gmemd: each one's monitor, and its end of the connection."""
    gmemd = Gmemd(schema=Schema.load(), kernel=choose_kernel("simulated"),
                  version={"qemu": {"major": 11, "minor": 1, "micro": 0}, "package": "test"}, host=Mock())
    dispatcher, loop = Dispatcher(gmemd), asyncio.get_running_loop()
    made: list[tuple[Monitor, socket.socket]] = []

    def connect() -> tuple[Monitor, socket.socket]:
        here, there = socket.socketpair()
        here.setblocking(False)
        there.setblocking(False)
        made.append((Monitor(loop, here, dispatcher, pretty=False, closed=lambda _: None, users=Users(loop)), there))
        return made[-1]

    yield connect
    for monitor, there in made:
        monitor.close()
        there.close()
    gmemd.close()


async def lines(client: socket.socket, count: int) -> list[bytes]:
    """So many lines; what is read beyond them is lost."""
    data = b""
    while data.count(b"\n") < count:
        data += await asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, 1 << 20), PATIENCE)
    return data.splitlines()[:count]


@pytest.mark.asyncio
async def test_one_who_sends_much_does_not_keep_others_waiting(connect: Connect) -> None:
    (_, busy), (_, other) = connect(), connect()
    for client in (busy, other):
        client.send(NEGOTIATE)
        await lines(client, 2)
    many = 500  # a multiple of what a turn has time for, in one read
    busy.send(PING * many)
    other.send(PING)
    await lines(other, 1)
    early = at_hand(busy)
    assert early < many
    assert len(await lines(busy, many - early)) == many - early


@pytest.mark.asyncio
async def test_what_was_answered_is_sent_before_a_client_is_disconnected(connect: Connect) -> None:
    """Replies of a turn that others end are sent together with the next ones, or at the end."""
    monitor, client = connect()
    client.send(NEGOTIATE)
    await lines(client, 2)
    client.send(PING * 500)
    monitor._readable()
    assert monitor._more
    early = at_hand(client)
    monitor.close()
    assert early + at_hand(client) > 0


@pytest.mark.asyncio
async def test_who_has_sent_much_begins_after_others(connect: Connect) -> None:
    """Where others have been seen to wait; who has sent little is answered at once."""
    monitor, client = connect()
    client.send(NEGOTIATE)
    await lines(client, 2)
    monitor._turns.expected = 1
    client.send(PING)
    monitor._readable()
    assert at_hand(client) == 1
    client.send(PING * 100)
    monitor._readable()
    assert at_hand(client) == 0
    assert len(await lines(client, 100)) == 100


def at_hand(client: socket.socket) -> int:
    """How many lines a client can read now."""
    try:
        return client.recv(1 << 20).count(b"\n")
    except BlockingIOError:
        return 0


@pytest.mark.asyncio
async def test_requests_of_one_who_does_not_read_wait(connect: Connect) -> None:
    monitor, client = connect()
    client.send(NEGOTIATE)
    await lines(client, 2)
    many = 400  # with replies of 200 KiB each
    client.send(b"".join(b'{"execute": "query-qmp-schema", "id": %d}\n' % number for number in range(many)))
    for _ in range(100):
        await asyncio.sleep(0)
    assert monitor._outgoing.weight < HIGH_WATER + (8 << 20)  # and what a turn adds
    assert [json.loads(line)["id"] for line in await lines(client, many)] == list(range(many))


@pytest.mark.asyncio
async def test_what_a_client_has_sent_is_carried_out_if_it_closes_while_commands_are_loaded(connect: Connect) -> None:
    monitor, client = connect()
    loader, closed = monitor._dispatcher.loader, threading.Event()
    loader.loads_nothing, loader.first = threading.get_ident(), lambda: closed.wait(PATIENCE) and None
    tasks: list[asyncio.Task[None]] = []
    monitor._gmemd.spawn = lambda work: tasks.append(asyncio.create_task(work))  # type: ignore[method-assign]
    tally = monitor._gmemd.counters.commands["query-memdev"]
    client.sendall(NEGOTIATE + b'{"execute": "query-memdev"}\n' * 5)
    async with asyncio.timeout(PATIENCE):
        while not loader.loading:
            await asyncio.sleep(0)
        client.close()
        closed.set()
        while monitor._open:
            await asyncio.sleep(0.001)
    assert tally.succeeded == 5
