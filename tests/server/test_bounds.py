"""What one client can take of what belongs to all, and what is left when it goes."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import socket
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import pytest_asyncio

from gmemd.qmp.encode import encode_pretty
from gmemd.qmp.rows import PIECE
from gmemd.qmp.session import Session
from gmemd.server.outgoing import FD_WEIGHT, HIGH_WATER, Outgoing
from gmemd.server.room import LARGE, LONGEST_SECONDS, SILENT_SECONDS, Room
from tests.lingering import Lingering
from tests.server.clients import Client, Hub

pytestmark = pytest.mark.asyncio

OBJECT = {"qom_type": "memory-backend-memfd", "id": "a", "size": 4096}


@pytest_asyncio.fixture
async def hub() -> AsyncIterator[Hub]:
    """A gmemd that has given every descriptor back in the end."""
    made = Hub()
    yield made
    await made.close()


def count_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def memfd(content: bytes) -> int:
    fd = os.memfd_create("given", os.MFD_ALLOW_SEALING)
    os.pwrite(fd, content.ljust(4096, b"\0"), 0)
    return fd


async def test_names_of_getfd_are_the_clients_own(hub: Hub) -> None:
    """Two clients may use one name; neither can see, take or close what the other has."""
    one, other = await hub.client(), await hub.client()
    for client, content in ((one, b"one"), (other, b"other")):
        fd = memfd(content)
        assert await client.do("getfd", fd, fdname="mem") == {}
        os.close(fd)
    assert await other.do("closefd", fdname="mem") == {}
    assert await other.do("closefd", fdname="mem") == "File descriptor named 'mem' not found"
    assert "size" in await one.do("memdev-adopt", id="a", fdname="mem", require_seals=False)
    assert os.pread(hub.gmemd.objects.find("a").fd, 3, 0) == b"one"


async def test_sets_are_shared(hub: Hub) -> None:
    """What add-fd keeps belongs to all, and stays when its giver goes."""
    one, other = await hub.client(), await hub.client()
    fd = memfd(b"")
    kept = (await one.do("add-fd", fd))["fd"]
    os.close(fd)
    one.sock.close()
    await hub.until(lambda: one.monitor not in hub.monitors)
    assert await other.do("query-fdsets") == [{"fdset-id": 0, "fds": [{"fd": kept}]}]
    assert await other.do("remove-fd", fdset_id=0) == {}


async def test_what_a_client_kept_ends_with_it(hub: Hub) -> None:
    """Named, untaken, and more than the first of a batch: nothing stays."""
    before = count_fds()
    for _ in range(5):
        client = await hub.client()
        fd = memfd(b"")
        for name in "abc":
            await client.do("getfd", fd, fd, fd, fdname=name)
        await client.do("query-version", fd, fd)
        os.close(fd)
        client.sock.close()
    await hub.until(lambda: count_fds() <= before)


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    """This process may have 256 descriptors."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.usefixtures("few_descriptors")  # before there is a hub
async def test_a_client_keeps_only_its_share_of_descriptors() -> None:
    """Beyond it getfd and add-fd refuse, and close what came; what is closed makes room."""
    hub = Hub()
    client = await hub.client()
    fd = memfd(b"")
    for number in range(32):
        assert await client.do("getfd", fd, fdname=f"n{number}") == {}
        assert "fd" in await client.do("add-fd", fd, fdset_id=1)
    before = count_fds()
    assert "32 descriptors have names" in await client.do("getfd", fd, fdname="more")
    assert "32 descriptors are in sets" in await client.do("add-fd", fd)
    assert await client.do("getfd", fd, fdname="n7") == {}
    assert count_fds() == before
    assert await client.do("closefd", fdname="n3") == {}
    assert await client.do("getfd", fd, fdname="more") == {}
    assert await client.do("remove-fd", fdset_id=1) == {}
    os.close(fd)
    await hub.close()


async def test_replies_with_descriptors_wait_for_who_does_not_read(hub: Hub) -> None:
    """Few descriptors wait for a client; its requests wait instead, and none is lost."""
    client, many = await hub.client(), 2000
    await client.do("object-add", **OBJECT)
    before = count_fds()
    requests = b"".join(b'{"execute": "memdev-get-fd", "arguments": {"id": "a"}, "id": %d}' % number
                        for number in range(many))
    sending = asyncio.create_task(client.send_bytes(requests))
    await hub.until(lambda: client.monitor._outgoing.weight > HIGH_WATER)
    for _ in range(100):
        await asyncio.sleep(0)
    assert count_fds() - before <= HIGH_WATER // FD_WEIGHT + 1
    got = 0
    for number in range(many):
        assert (await client.message())["id"] == number
        got += len(client.fds)
        while client.fds:
            os.close(client.fds.pop())
    assert got == many
    await sending


class Crowded:
    """A socket, while its user has too many descriptors under way for one more; what a test cannot bring about."""

    def __init__(self, sock: socket.socket, refusals: int) -> None:
        self._sock = sock
        self._refusals = refusals
        self.fileno, self.send = sock.fileno, sock.send

    def sendmsg(self, buffers: list[bytes], ancillary: list[tuple[int, int, bytes]]) -> int:
        if self._refusals:
            self._refusals -= 1
            raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))
        return self._sock.sendmsg(buffers, ancillary)


async def test_a_reply_waits_until_its_descriptor_can_be_passed(hub: Hub) -> None:
    """Others of the user have too many under way: nobody is cut for that, and the order stays."""
    here, there = socket.socketpair()
    outgoing = Outgoing(hub.loop, Crowded(here, 3), Session({}), hub.gmemd.counters,  # type: ignore[arg-type]
                        hub.users.find("other", {}), room=lambda: None, cut=here.close)
    with here, there:
        fd = memfd(b"passed")
        outgoing.send(b"one ")
        outgoing.send(b"two ", [fd])
        outgoing.send(b"three")
        await hub.until(lambda: outgoing.weight == 0)
        assert there.recv(4) == b"one "
        data, fds, _, _ = socket.recv_fds(there, 100, 2)
        assert os.pread(fds[0], 6, 0) == b"passed"
        os.close(fds[0])
        assert data + there.recv(100) == b"two three"
        outgoing.close()


async def test_events_wait_in_few_pieces(hub: Hub) -> None:
    """What piles up for a listener that does not read costs little to keep and to drop; then it is cut."""
    deaf = await hub.client()
    while not deaf.monitor._outgoing.weight:
        hub.gmemd.emit("MEMDEV_CONVERTED", {"id": "x" * 1000})
        await asyncio.sleep(0)
    for _ in range(1000):
        hub.gmemd.emit("MEMDEV_CONVERTED", {"id": "x" * 1000})
        await asyncio.sleep(0)
    outgoing = deaf.monitor._outgoing
    assert len(outgoing._waiting) <= outgoing.weight // PIECE + 1
    while deaf.monitor in hub.monitors:
        for _ in range(100):
            hub.gmemd.emit("MEMDEV_CONVERTED", {"id": "x" * 1000})
        await asyncio.sleep(0)


async def test_events_come_before_the_reply(hub: Hub) -> None:
    """A command's events reach its own client before its reply, and the others at all."""
    one, other = await hub.client(), await hub.client()
    one.send("quit")
    assert [next(iter(await one.message())) for _ in range(2)] == ["timestamp", "return"]
    assert (await other.message())["event"] == "SHUTDOWN"


async def test_nobody_waits_for_a_lingering_socket(hub: Hub, lingering: Lingering) -> None:
    """closefd answers when it is closed; others are served meanwhile."""
    client, other = await hub.client(), await hub.client()
    assert await client.do("getfd", lingering.give(), fdname="x") == {}
    lingering.given()
    client.send("closefd", fdname="x")
    for _ in range(3):
        assert "qemu" in await other.do("query-version")
    assert not client.has_message()


async def test_nobody_waits_for_what_a_client_leaves(hub: Hub, lingering: Lingering) -> None:
    """Untaken, replaced, unread: closing it holds nobody up."""
    client, other = await hub.client(), await hub.client()
    client.send("query-version", lingering.give())  # untaken
    client.send("query-name", lingering.give())  # replaces it, and is busy
    client.send("query-version", lingering.give())  # unread
    lingering.given()
    await client.message()
    await hub.until(lambda: client.monitor._busy)
    client.monitor.close()
    for _ in range(3):
        assert "qemu" in await other.do("query-version")


async def test_who_passes_what_takes_long_to_close_waits(hub: Hub, lingering: Lingering) -> None:
    """Such descriptors cannot be piled up: one that nobody wants is closed before more is read."""
    client, other, null = await hub.client(), await hub.client(), os.open(os.devnull, os.O_RDONLY)
    client.send("query-version", null, lingering.give())
    lingering.given()
    os.close(null)
    await client.message()
    client.send("query-version")
    for _ in range(3):
        assert "qemu" in await other.do("query-version")
    assert not client.has_message()
    lingering.let_go()
    assert "return" in await client.message()


async def test_descriptors_stay_with_the_commands_they_came_with(hub: Hub) -> None:
    """Also where commands are read ahead behind a long one; more than the queue holds does not matter."""
    client, names = await hub.client("oob"), "abcdefghijkl"
    client.send("query-name")
    for name in names:
        fd = memfd(name.encode())
        client.send("getfd", fd, fdname=name)
        os.close(fd)
    await hub.until(lambda: client.monitor._inbox.requests == 8)
    hub.go.set()
    for _ in range(1 + len(names)):
        assert "return" in await client.message()
    for name in names:
        await client.do("memdev-adopt", id=name, fdname=name, require_seals=False)
        assert os.pread(hub.gmemd.objects.find(name).fd, 1, 0) == name.encode()


async def test_out_of_band_is_answered_beside_descriptors_read_ahead(hub: Hub) -> None:
    """Seven commands with descriptors may wait, and one out of band overtakes them."""
    client = await hub.client("oob")
    client.send("query-name")
    fd = memfd(b"")
    for number in range(7):
        client.send("getfd", fd, fdname=f"n{number}")
    os.close(fd)
    client.send("yank", execute="exec-oob", instances=[])
    assert await client.message() == {"return": {}}
    hub.go.set()
    assert (await client.message())["return"] == {"name": "slow"}


async def test_what_a_closed_client_has_sent_is_carried_out(hub: Hub) -> None:
    """Nobody hears the answers, but who sends and closes has said what he wants."""
    client = Client(hub)
    client.send("qmp_capabilities")
    client.send("object-add", **OBJECT)
    for number in range(200):  # more than is read at a time
        client.send("object-add", **{**OBJECT, "id": f"n{number}"})
    client.sock.close()
    await hub.until(lambda: client.monitor not in hub.monitors)
    assert len(hub.gmemd.objects) == 201


async def test_who_does_not_listen_any_more_may_go_on_sending(hub: Hub) -> None:
    """shutdown(SHUT_RD) is not the end of the connection."""
    client = await hub.client()
    client.sock.shutdown(socket.SHUT_RD)
    client.send("object-add", **OBJECT)
    await hub.until(lambda: len(hub.gmemd.objects) == 1)
    client.send("object-del", id="a")
    await hub.until(lambda: len(hub.gmemd.objects) == 0)


@pytest.mark.parametrize("enable", [[], ["oob"]])
async def test_what_waits_behind_a_long_command_ends_with_its_client(hub: Hub, enable: list[str]) -> None:
    """As in QEMU: the running one finishes; descriptors and names that wait go, too."""
    before = count_fds()
    client = await hub.client(*enable)
    fd = memfd(b"")
    await client.do("getfd", fd, fdname="kept")
    client.send("query-name")
    await hub.until(lambda: client.monitor._busy)
    client.send("getfd", fd, fdname="more")
    client.send("object-add", **OBJECT)
    if enable:
        await hub.until(lambda: client.monitor._inbox.requests == 2)
    client.sock.close()
    os.close(fd)
    hub.go.set()
    await hub.until(lambda: client.monitor not in hub.monitors)
    assert len(hub.gmemd.objects) == 0
    await hub.until(lambda: count_fds() <= before)


async def test_what_waits_behind_a_long_command_is_carried_out_after_a_half_close(hub: Hub) -> None:
    """Who only ends the input waits for the answers."""
    client = await hub.client()
    client.send("query-name")
    await hub.until(lambda: client.monitor._busy)
    client.send("object-add", **OBJECT)
    client.sock.shutdown(socket.SHUT_WR)
    hub.go.set()
    assert [(await client.message())["return"] for _ in range(2)] == [{"name": "slow"}, {}]
    with pytest.raises(EOFError):
        await client.message()


async def test_one_large_message_at_a_time(hub: Hub) -> None:
    """The others' wait unread, each with little; all are answered in the end."""
    clients = [await hub.client() for _ in range(3)]
    half = b'{"execute": "query-version", "arguments": {"a": "' + b"x" * (8 * LARGE)
    sending = [asyncio.create_task(client.send_bytes(half)) for client in clients]
    holder = clients[0]
    await sending[0]
    await hub.until(lambda: all(client.monitor._half > LARGE for client in clients))
    for _ in range(100):
        await asyncio.sleep(0)
    weights = [client.monitor._half for client in clients]
    assert weights[0] > 8 * LARGE
    assert max(weights[1:]) < LARGE + (1 << 16)
    assert "qemu" in await (await hub.client()).do("query-version")
    for client, sent in zip(clients, sending, strict=True):
        await sent
        await client.send_bytes(b'"}}')
        assert (await client.message())["error"]["desc"] == "Parameter 'a' is unexpected"
    assert holder.monitor in hub.monitors


async def test_many_short_tokens_weigh_more_than_their_bytes(hub: Hub) -> None:
    """What is made of them is what takes the memory."""
    clients = [await hub.client() for _ in range(2)]
    half = b'{"execute": "query-version", "arguments": {"a": [' + b"0," * (LARGE // 32)
    for client in clients:
        await client.send_bytes(half)
    await hub.until(lambda: all(client.monitor._half > LARGE for client in clients))
    for client in clients:
        await client.send_bytes(b"0]}}")
        assert (await client.message())["error"]["desc"] == "Parameter 'a' is unexpected"


@pytest.mark.parametrize(("arguments", "said"), [
    (b'{"enable": [' + b'"oob", ' * 50_000 + b'"x"]}', "Parameter 'null' does not accept value 'x'"),
    (b'{"enable": [' + b'"oob", ' * 50_000 + b'"oob"]}', "Capabilities negotiation is already complete"),
    (b'{"a": [' + b"0, " * 50_000 + b"0]}", "Parameter 'a' is unexpected"),
])
async def test_long_requests_are_judged_beside_the_loop(hub: Hub, arguments: bytes, said: str) -> None:
    """And answered as shorter ones are, in their turn; changes that came before them first."""
    client, begun = await hub.client(), hub.begun
    assert "desc" not in str(await client.do("object-add", **OBJECT))
    await client.send_bytes(b'{"execute": "qmp_capabilities", "arguments": %b, "id": 1}{"execute": "query-version"}'
                            % arguments)
    message = await client.message()
    assert message["id"] == 1
    assert message["error"]["desc"].startswith(said)
    assert "return" in await client.message()
    assert hub.begun == begun + 1


async def test_what_is_wrong_with_a_long_request_is_said(hub: Hub) -> None:
    """The envelope, an unknown command, and one out of band, which is judged at once."""
    client, long = await hub.client("oob"), b"[" + b"0, " * 50_000 + b"0]"
    for text, said in ((b'{"execute": 1, "id": %b}', "QMP input member 'execute' must be a string"),
                       (b'{"execute": "nonsense", "id": %b}', "The command nonsense has not been found"),
                       (b'{"exec-oob": "yank", "arguments": {"instances": %b}}',
                        "Invalid parameter type for 'instances[0]', expected: object"),
                       (b"%b", "QMP input must be a JSON object")):
        await client.send_bytes(text % long)
        assert (await client.message())["error"]["desc"] == said


def create(hub: Hub, count: int) -> None:
    """Objects without memory."""
    for number in range(count):
        hub.gmemd.objects.commit(hub.gmemd.objects.begin(
            hub.gmemd.schema.check_object({"qom-type": "memory-backend-ram", "id": f"o{number}", "size": 4096}),
            (0, 0), lambda name: None))


async def test_an_answer_in_pieces_is_one_line(hub: Hub) -> None:
    """What comes in several pieces is followed by what was asked for later, whoever reads slowly."""
    create(hub, 4 * PIECE // len('{"name": "o1234", "type": "child<memory-backend-ram>"}, '))
    client = await hub.client()
    for number in range(3):
        await client.send_bytes(b'{"execute": "qom-list", "arguments": {"path": "/objects"}, "id": "%d"}'
                                b'{"execute": "query-fdsets"}' % number)
    for number in range(3):
        answer = await client.message()
        assert (answer["id"], len(answer["return"])) == (str(number), 1 + len(hub.gmemd.objects))
        assert await client.message() == {"return": []}


async def test_long_answers_are_indented_beside_others(hub: Hub) -> None:
    """With pretty=on, too, others have their turn; the bytes are those of a short answer."""
    create(hub, 200)
    plain, pretty = await hub.client(), Client(hub, pretty=True)
    hub.clients.append(pretty)
    rows = await plain.do("qom-list", path="/objects")
    pretty.send("qmp_capabilities")
    pretty.send("qom-list", path="/objects")
    text = await pretty.text(3)
    assert text.endswith(encode_pretty({"return": rows}) + b"\r\n")


class Clock:
    """An event loop's clock that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0
        self.due: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now

    def call_later(self, seconds: float, call: Callable[[], None]) -> None:
        self.due.append((self.now + seconds, call))

    def advance(self, seconds: float) -> None:
        self.now += seconds
        due, self.due = self.due, []
        for when, call in due:
            if when <= self.now:
                call()
            else:
                self.due.append((when, call))


class Sender:
    def __init__(self, room: Room) -> None:
        self.room = room
        self.said: list[str] = []

    def go_on(self) -> None:
        self.said.append("go on")

    def close(self) -> None:
        self.said.append("closed")
        self.room.leave(self)


async def test_the_room_is_not_kept_from_others() -> None:
    """A holder that is silent, or too long there, is cut if others wait; the next in line has the room then."""
    clock = Clock()
    room = Room(clock)  # type: ignore[arg-type]
    silent, slow, last, gone = (Sender(room) for _ in range(4))
    assert room.enter(silent)
    clock.advance(10 * LONGEST_SECONDS)  # nobody waits
    assert [room.enter(one) for one in (silent, gone, slow, last)] == [True, False, False, False]
    room.leave(gone)
    clock.advance(SILENT_SECONDS)
    assert (silent.said, slow.said) == (["closed"], ["go on"])
    for _ in range(int(LONGEST_SECONDS / SILENT_SECONDS * 4)):
        assert last.said == []
        assert room.enter(slow)
        clock.advance(SILENT_SECONDS / 4)
    assert (slow.said, last.said, gone.said) == (["go on", "closed"], ["go on"], [])
    assert room.enter(last)
