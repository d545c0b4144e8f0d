"""What the clients of one user can take of what belongs to all users."""

from __future__ import annotations

import asyncio
import json
import os
import select
import socket
import sys
import threading
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from gmemd.errors import QmpError
from gmemd.objects.fds import NamedFds
from gmemd.objects.shares import Pool, Share
from gmemd.server import monitor, users
from gmemd.server.users import _CLOSERS, FULL_SECONDS, Users
from tests.daemon import Server
from tests.lingering import Lingering
from tests.server.clients import Client, Hub

OBJECT = {"qom_type": "memory-backend-memfd", "id": "a", "size": 4096}


@pytest_asyncio.fixture
async def hub() -> AsyncIterator[Hub]:
    """A gmemd that has given everything back in the end."""
    made = Hub()
    yield made
    await made.close()
    pools = (made.users.clients, made.users.unread, made.users.closing, made.users.named, made.users.in_flight)
    await made.until(lambda: not any(pool.taken for pool in pools))
    assert made.user.clients.taken == 0


def memfd() -> int:
    return os.memfd_create("given", os.MFD_ALLOW_SEALING)


async def ask_for_schema(client: Client, times: int) -> None:
    """Requests with answers of 200 KB each."""
    await client.send_bytes(b'{"execute": "query-qmp-schema"}\n' * times)


def test_each_may_have_as_much_as_is_left() -> None:
    """A half, a quarter, an eighth; a little in any case; a policy's limit instead."""
    pool = Pool(160, 4)
    first, second, third, last = (Share(pool) for _ in range(4))
    for share, most in ((first, 80), (second, 40), (third, 20)):
        while share.allows(1):
            share.take(1)
        assert share.taken == most
    last.take(4)
    pool.taken = 160
    assert not last.allows(1)
    second.take(-40)
    pool.taken = 120
    assert last.allows(36)
    bound = Share(pool, 100)
    bound.take(100)
    assert not bound.allows(1)


def test_names_of_all_clients_of_a_user() -> None:
    """Together no more than its share; a name that is given up makes room."""
    share = Share(Pool(1000), 3)
    one, other = NamedFds(share), NamedFds(share)
    assert [one.receive("a", 1), one.receive("b", 2), other.receive("a", 3)] == [[], [], []]
    with pytest.raises(QmpError, match="3 descriptors of this user's clients have names already"):
        other.receive("b", 4)
    assert other.receive("a", 5) == [3]
    assert one.take("a") == 1
    assert one.give_back("a", 1)
    assert one.take_all() == [2, 1]
    assert other.receive("b", 4) == []
    assert share.taken == 2


def test_one_connection_too_many_is_told_why() -> None:
    """And hung up on; others stay, and one that goes makes room."""
    with Server(["sh", "-c", 'ulimit -n 80 && exec "$0" "$@"', sys.executable, "-m", "gmemd", "--qmp", "{address}",
                 "--persist", "off", "--kernel", "simulated", "--state-dir", "{directory}/state"]) as daemon:
        clients = [daemon.client() for _ in range(20)]
        with pytest.raises(QmpError, match="this user has 20 connections already, the most it may have now"):
            daemon.client()
        with daemon.connect() as sock, sock.makefile("rb") as lines:
            assert json.loads(lines.readline())["error"]["class"] == "GenericError"
            assert lines.read() == b""
        for client in clients:
            assert "qemu" in client.execute("query-version")
        clients.pop().close()
        clients.append(daemon.client())
        for client in clients:
            client.close()


@pytest.mark.asyncio
async def test_who_does_not_read_is_cut_where_its_user_holds_too_much(hub: Hub) -> None:
    """Requests of the same user wait meanwhile; none of them is lost."""
    hub.users.unread.size = 4 << 20
    deaf = [await hub.client() for _ in range(3)]
    reader = await hub.client()
    for client in deaf:
        await ask_for_schema(client, 30)
    user = hub.user
    await hub.until(lambda: user.full)
    assert user.unread.taken < 3 << 20
    reader.send("query-version")
    begun = hub.loop.time()
    assert "qemu" in (await reader.message())["return"]
    assert hub.loop.time() - begun > FULL_SECONDS / 2
    await hub.until(lambda: not user.full)
    assert reader.monitor in hub.monitors
    assert any(client.monitor not in hub.monitors for client in deaf)


@pytest.mark.asyncio
async def test_who_reads_is_not_cut(hub: Hub) -> None:
    """However much its user's clients ask for, who reads gets all of it."""
    hub.users.unread.size = 2 << 20
    clients = [await hub.client() for _ in range(3)]
    await asyncio.gather(*(ask_for_schema(client, 20) for client in clients))
    for _ in range(20):
        for client in clients:
            assert len((await client.message())["return"]) > 100


@pytest.mark.asyncio
async def test_an_event_cuts_who_has_much_unread_where_its_user_holds_too_much(hub: Hub) -> None:
    """Otherwise the events of many deaf clients would add up to 8 MiB each."""
    hub.users.unread.size = 4 << 20
    deaf = [await hub.client() for _ in range(8)]
    for _ in range(5000):
        hub.emit("RESUME", {"padding": "x" * 500})
        await asyncio.sleep(0)
        if not all(client.monitor in hub.monitors for client in deaf):
            break
    assert hub.users.unread.taken < 4 << 20
    assert len(hub.monitors) < len(deaf)


@pytest.mark.asyncio
async def test_descriptors_in_flight(hub: Hub) -> None:
    """Replies with more than the user's share wait until some are received; no reply is lost."""
    hub.users.in_flight.size = 64
    clients = [await hub.client() for _ in range(3)]
    await clients[0].do("object-add", **OBJECT)
    user = hub.user
    for client in clients:
        for _ in range(40):
            client.send("memdev-get-fd", id="a")
    await hub.until(lambda: all(client.monitor._outgoing.in_flight >= 16 for client in clients))
    await asyncio.sleep(0.1)
    assert user.in_flight.taken <= 3 * 16
    for client in clients:
        for _ in range(40):
            assert "return" in await client.message()
        while client.fds:
            os.close(client.fds.pop())


@pytest.mark.asyncio
async def test_who_is_cut_with_descriptors_in_flight_still_counts(hub: Hub) -> None:
    """Connecting again and again leaves no more of them in flight."""
    client = await hub.client()
    await client.do("object-add", **OBJECT)
    user = hub.user
    for _ in range(5):
        client.send("memdev-get-fd", id="a")
    await hub.until(lambda: user.in_flight.taken == 5)
    client.monitor.close()
    assert (user.clients.taken, user.in_flight.taken) == (1, 5)
    client.sock.close()
    await hub.until(lambda: (user.clients.taken, user.in_flight.taken) == (0, 0))


@pytest.mark.asyncio
async def test_half_a_message_has_its_time(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who does not complete it is disconnected; who is not read at the time, or idle, is not."""
    monkeypatch.setattr(monitor, "HALF_SECONDS", 0.05)
    half, idle, busy = await hub.client(), await hub.client(), await hub.client("oob")
    busy.send("query-name")
    for _ in range(8):
        busy.send("query-version")
    await busy.send_bytes(b'{"execute": "query-')
    await half.send_bytes(b'{"execute": "query-ver')
    with pytest.raises(EOFError):
        await half.message()
    await asyncio.sleep(0.2)
    hub.go.set()
    for _ in range(9):
        assert "return" in await busy.message()
    await busy.send_bytes(b'version"}')
    assert "return" in await busy.message()
    assert "qemu" in await idle.do("query-version")


@pytest.mark.asyncio
async def test_many_halves_are_read_one_at_a_time(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the half messages of a user add up, each further one waits with what it has."""
    monkeypatch.setattr(users, "HALVES", 1 << 20)
    clients = [await hub.client() for _ in range(20)]
    half = b'{"execute": "query-version", "arguments": {"a": "' + b"x" * 200_000
    sending = [asyncio.create_task(client.send_bytes(half)) for client in clients]
    await asyncio.sleep(0.2)
    assert sum([client.monitor._half for client in clients]) < (1 << 20) + 20 * (16 << 10) + 200_000

    async def complete(client: Client, sent: asyncio.Task[None]) -> None:
        await sent
        await client.send_bytes(b'"}}')
        assert "error" in await client.message()

    await asyncio.gather(*map(complete, clients, sending))


@pytest.mark.asyncio
async def test_descriptors_behind_a_long_command_do_not_pile_up(hub: Hub) -> None:
    """Of those that no request came with, the last one stays, as if nothing were read ahead."""
    client, reader = await hub.client("oob"), os.pipe()[0]
    client.send("query-name")
    await hub.until(lambda: client.monitor._busy)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(300):
        socket.send_fds(client.sock, [b" "], [reader])
        await asyncio.sleep(0)
    await hub.until(lambda: not select.select([client.monitor._fd], [], [], 0)[0])
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    client.send("getfd", fdname="x")
    hub.go.set()
    assert [await client.message() for _ in range(2)] == [{"return": {"name": "slow"}}, {"return": {}}]
    os.close(reader)


@pytest.mark.asyncio
async def test_closing_takes_few_threads(hub: Hub) -> None:
    """However many clients pass what takes long to close; all of it is closed in the end."""
    lingering = [Lingering() for _ in range(_CLOSERS + 8)]
    before, user = threading.active_count(), hub.user
    clients = [await hub.client() for _ in lingering]
    null = os.open(os.devnull, os.O_RDONLY)
    for client, one in zip(clients, lingering, strict=True):
        client.send("query-version", null, one.give())
        one.given()
        await client.message()
    os.close(null)
    assert (user._closers, len(user._to_close)) == (_CLOSERS, 8)
    assert threading.active_count() == before
    for one in lingering:
        one.let_go()
    await hub.until(lambda: not user.closing.taken)
    for client in clients:
        assert "qemu" in await client.do("query-version")


@pytest.mark.asyncio
async def test_a_user_without_clients_is_forgotten() -> None:
    """So that the users of a host do not add up."""
    made = Hub()
    await made.client()
    user = made.user
    await made.close()
    await made.until(lambda: not made.users._users)
    assert user.clients.taken == 0
    assert isinstance(made.users, Users)
