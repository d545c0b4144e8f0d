"""The blocking client, against bytes laid ready in a socket pair, and against a real QEMU."""

from __future__ import annotations

import array
import fcntl
import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gmemd.qmp.client
from gmemd.client.client import Client, ProtocolError
from gmemd.client.messages import Messages
from gmemd.errors import COMMAND_NOT_FOUND, QmpError
from tests.daemon import Server
from tests.patience import PATIENCE

GREETING = b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 1, "major": 11}}, "capabilities": ["oob"]}}\r\n'
NEGOTIATED = GREETING + b'{"return": {}, "id": 1}\r\n'


class Peer:
    """The server's end of a socket pair: what the client will read is laid ready before it asks."""

    def __init__(self) -> None:
        self.socket, self.client_end = socket.socketpair()
        self.socket.settimeout(PATIENCE)

    def lay(self, data: bytes, fds: list[int] | None = None) -> None:
        passed = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds or []))]
        assert self.socket.sendmsg([data], passed if fds else []) == len(data)

    def connect(self, **options: Any) -> Client:
        self.lay(NEGOTIATED)
        client = Client(self.client_end, timeout=PATIENCE, **options)
        self.sent()
        return client

    def sent(self) -> list[Any]:
        """What the client has written, one value a line."""
        return [json.loads(line) for line in self.socket.recv(1 << 20).splitlines()]


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer()
    yield made
    made.socket.close()
    made.client_end.close()


@pytest.fixture
def no_leak() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


def same_file(one: int, other: int) -> bool:
    return os.path.samestat(os.fstat(one), os.fstat(other))


# -- negotiation


def test_negotiates(peer: Peer) -> None:
    """The client reads the greeting, then enables nothing."""
    peer.lay(NEGOTIATED)
    with Client(peer.client_end, timeout=PATIENCE) as client:
        assert peer.sent() == [{"execute": "qmp_capabilities", "id": 1}]
        assert client.greeting["capabilities"] == ["oob"]
        assert client.oob is False


def test_enables_oob_when_wanted_and_offered(peer: Peer) -> None:
    """oob is enabled only if the server offers it."""
    peer.lay(NEGOTIATED)
    with Client(peer.client_end, timeout=PATIENCE, oob=True) as client:
        assert client.oob is True
        assert peer.sent() == [{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}, "id": 1}]
        peer.lay(b'{"return": [], "id": 2}\r\n')
        assert client.execute("query-yank", oob=True) == []
        assert peer.sent() == [{"exec-oob": "query-yank", "id": 2}]


def test_oob_not_offered(peer: Peer) -> None:
    """Without the offer the client goes on without oob."""
    peer.lay(b'{"QMP": {"version": {}, "capabilities": []}}\r\n{"return": {}, "id": 1}\r\n')
    with Client(peer.client_end, timeout=PATIENCE, oob=True) as client:
        assert client.oob is False


@pytest.mark.parametrize("greeting", [b"SSH-2.0-x\r\n", b'{"hello": 1}\n', b'{"QMP": 1}\n', b"[]\n", b"{]\n", b"{1}"])
def test_not_a_qmp_server(peer: Peer, greeting: bytes) -> None:
    """A peer that speaks something else is found out at its first bytes, without waiting."""
    peer.lay(greeting)
    with pytest.raises(ProtocolError, match="the server"):
        Client(peer.client_end, timeout=PATIENCE)
    assert peer.client_end.fileno() == -1


# -- commands


def test_execute_returns_the_value(peer: Peer) -> None:
    """Arguments go as given; absent ones are not sent."""
    with peer.connect() as client:
        peer.lay(b'{"return": {"a": [1, "\\u00FC", true]}, "id": 2}\r\n{"return": {}, "id": 3}\r\n')
        assert client.execute("some-command", {"x": {"y": None}}) == {"a": [1, "ü", True]}
        assert client.execute("other") == {}
        assert peer.sent() == [
            {"execute": "some-command", "arguments": {"x": {"y": None}}, "id": 2},
            {"execute": "other", "id": 3},
        ]


def test_refusal_is_a_qmp_error(peer: Peer) -> None:
    """An error reply raises QmpError with class and sentence; the next command works."""
    with peer.connect() as client:
        peer.lay(b'{"id": 2, "error": {"class": "CommandNotFound", "desc": "The command x has not"}}\r\n')
        with pytest.raises(QmpError, match="The command x has not") as caught:
            client.execute("x")
        assert caught.value.error_class == COMMAND_NOT_FOUND
        peer.lay(b'{"return": {}, "id": 3}\r\n')
        assert client.execute("y") == {}


def test_error_without_id_answers_the_command(peer: Peer) -> None:
    """QEMU's parse errors carry no id; they answer what is under way."""
    with peer.connect() as client:
        peer.lay(b'{"error": {"class": "GenericError", "desc": "JSON parse error"}}\r\n')
        with pytest.raises(QmpError, match="JSON parse error"):
            client.execute("x")


@pytest.mark.usefixtures("no_leak")
def test_late_reply_is_dropped(peer: Peer) -> None:
    """After a time-out the connection works on; the late reply and its fds are dropped."""
    with peer.connect() as client:
        with pytest.raises(TimeoutError):
            client.execute("slow", timeout=0)
        peer.lay(b'{"return": "late", "id": 2}\r\n', [0])
        peer.lay(b'{"return": "mine", "id": 3}\r\n', [1])
        value, fds = client.execute_fds("quick")
        assert value == "mine"
        assert len(fds) == 1
        assert same_file(fds[0], 1)
        os.close(fds[0])


def test_connection_lost(peer: Peer) -> None:
    """A server that goes away in the middle of a reply raises ConnectionError."""
    with peer.connect() as client:
        peer.lay(b'{"return": {')
        peer.socket.shutdown(socket.SHUT_WR)
        with pytest.raises(ConnectionError, match="closed the connection"):
            client.execute("x")


@pytest.mark.parametrize("reply", [b'{"neither": 1}\n', b"{1: 2}\n", b'{"error": "text", "id": 2}\n', b"7\n"])
def test_reply_that_is_none(peer: Peer, reply: bytes) -> None:
    """What is neither reply nor event, or not JSON, raises ProtocolError."""
    with peer.connect() as client:
        peer.lay(reply)
        with pytest.raises(ProtocolError):
            client.execute("x")


def test_send_text_returns_whole_replies(peer: Peer) -> None:
    """Bytes go unchanged, and as many replies as wanted come back with ids and errors as sent."""
    with peer.connect() as client:
        peer.lay(b'{"return": {}, "id": [7]}\r\n{"event": "E"}\r\n{"error": {"class": "C", "desc": "D"}}\r\n')
        assert client.send_text(b"{'execute':'x','id':[7]}}", 2) == [
            {"return": {}, "id": [7]},
            {"error": {"class": "C", "desc": "D"}},
        ]
        assert peer.socket.recv(100) == b"{'execute':'x','id':[7]}}"


def test_send_times_out_and_closes() -> None:
    """A server that does not read cannot hold us forever; half a command closes the connection."""
    peer = Peer()
    with peer.socket, peer.connect() as client:
        with pytest.raises(TimeoutError):
            client.execute("x", {"text": "y" * 10_000_000}, timeout=0.01)
        assert client.fileno() == -1


# -- file descriptors


@pytest.mark.usefixtures("no_leak")
def test_receives_fds_close_on_exec(peer: Peer, tmp_path: Path) -> None:
    """fds come with their reply, close-on-exec, and are the caller's."""
    with peer.connect() as client, (tmp_path / "f").open("w") as file:
        peer.lay(b'{"return": {"size": 5}, "id": 2}\r\n', [file.fileno()])
        value, fds = client.execute_fds("memdev-get-fd", {"id": "m0"})
        assert value == {"size": 5}
        assert len(fds) == 1
        assert same_file(fds[0], file.fileno())
        assert fcntl.fcntl(fds[0], fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        os.close(fds[0])


@pytest.mark.usefixtures("no_leak")
def test_unwanted_fds_are_closed(peer: Peer) -> None:
    """execute, an error reply, an event and close() leave no fd behind."""
    with peer.connect() as client:
        peer.lay(b'{"return": {}, "id": 2}\r\n', [0, 1])
        client.execute("x")
        peer.lay(b'{"event": "E"}\r\n', [0])
        peer.lay(b'{"error": {"class": "C", "desc": "D"}, "id": 3}\r\n', [0])
        with pytest.raises(QmpError):
            client.execute_fds("x")
        peer.lay(b'{"return": {}, "id": 4}\r\n{"return"', [0])
        assert client.execute_fds("x") == ({}, [])


@pytest.mark.usefixtures("no_leak")
def test_fds_belong_to_the_message_they_came_with(peer: Peer) -> None:
    """An event read in one go with a reply does not take the reply's fds, nor a reply the next one's."""
    with peer.connect() as client:
        peer.lay(b'{"event": "E"}\r\n')
        peer.lay(b'{"return": "a", "id": 2}\r\n', [0])
        peer.lay(b'{"return": "b", "id": 3}\r\n', [1])
        first, first_fds = client.execute_fds("a")
        second, second_fds = client.execute_fds("b")
        assert (first, second) == ("a", "b")
        assert same_file(first_fds[0], 0)
        assert same_file(second_fds[0], 1)
        assert [len(first_fds), len(second_fds)] == [1, 1]
        os.close(first_fds[0])
        os.close(second_fds[0])


@pytest.mark.usefixtures("no_leak")
def test_fds_of_a_reply_in_pieces(peer: Peer) -> None:
    """fds arrive with the first piece of a long reply and wait for its end."""
    with peer.connect() as client:
        peer.lay(b'{"return": {"a": "}', [0])
        peer.lay(b'{"}, "id": 2}')
        peer.lay(b"\r\n")
        value, fds = client.execute_fds("x")
        assert value == {"a": "}{"}
        assert len(fds) == 1
        os.close(fds[0])


@pytest.mark.usefixtures("no_leak")
def test_many_fds(peer: Peer) -> None:
    """As many fds as the kernel passes in one message arrive."""
    with peer.connect() as client:
        peer.lay(b'{"return": {}, "id": 2}\r\n', [0] * 253)
        _, fds = client.execute_fds("x")
        assert len(fds) == 253
        for fd in fds:
            os.close(fd)


def test_sends_fds(peer: Peer, tmp_path: Path) -> None:
    """fds go with the command's bytes and stay the caller's."""
    with peer.connect() as client, (tmp_path / "f").open("w") as file:
        peer.lay(b'{"return": {}, "id": 2}\r\n')
        client.execute("getfd", {"fdname": "a"}, fds=[file.fileno(), 0])
        data, fds, _, _ = socket.recv_fds(peer.socket, 1000, 10)
        assert json.loads(data)["execute"] == "getfd"
        assert [same_file(fds[0], file.fileno()), same_file(fds[1], 0)] == [True, True]
        for fd in fds:
            os.close(fd)
        assert not file.closed


# -- events


def test_events_are_kept_in_order(peer: Peer) -> None:
    """Events met while waiting for a reply are kept; wait_event takes by name, take_events the rest."""
    with peer.connect() as client:
        peer.lay(b'{"event": "A"}\r\n{"event": "B"}\r\n{"return": {}, "id": 2}\r\n{"event": "C"}\r\n')
        client.execute("x")
        assert client.wait_event("B") == {"event": "B"}
        assert client.wait_event("C") == {"event": "C"}
        peer.lay(b'{"event": "D"}\r\n')
        assert client.take_events() == [{"event": "A"}, {"event": "D"}]
        assert client.events == []


def test_last_events_before_the_end(peer: Peer) -> None:
    """What a server says last is heard, then that it has gone."""
    with peer.connect() as client:
        peer.lay(b'{"event": "SHUTDOWN"}\r\n')
        peer.socket.shutdown(socket.SHUT_WR)
        assert client.take_events() == [{"event": "SHUTDOWN"}]
        with pytest.raises(ConnectionError):
            client.take_events()


def test_wait_event_times_out(peer: Peer) -> None:
    """An event that does not come in time raises TimeoutError; others stay."""
    with peer.connect() as client:
        peer.lay(b'{"event": "A"}\r\n')
        with pytest.raises(TimeoutError):
            client.wait_event("B", timeout=0.001)
        assert client.wait_event() == {"event": "A"}


# -- cutting the stream

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
MESSAGES = st.lists(st.dictionaries(st.text(), VALUES, max_size=3), max_size=4)


@settings(max_examples=50, deadline=None)
@given(
    messages=MESSAGES,
    indent=st.sampled_from([None, 4]),
    end=st.sampled_from([b"\r\n", b"\n", b"", b" \n\n "]),
    size=st.integers(1, 50),
    greets=st.booleans(),
)
def test_cut_does_not_depend_on_layout_or_pieces(
    messages: list[dict[str, Any]], indent: int | None, end: bytes, size: int, greets: bool
) -> None:
    """One line, several lines, no line feed, any pieces: the same messages come out.

    Whoever greets with a line feed ends all messages with one.
    """
    text = b"".join(json.dumps(message, indent=indent).encode() + end for message in messages)
    if greets and end:
        messages, text = [{"QMP": {}}, *messages], b'{"QMP": {}}\r\n' + text
    stream, found = Messages(), []
    for start in range(0, len(text), size):
        stream.feed(text[start : start + size], [])
        while (message := stream.next()) is not None:
            found.append(message[0])
    assert found == messages


def test_long_reply_in_pieces_is_linear() -> None:
    """A reply of 8 MB without a line feed, in small pieces, is looked at once."""
    stream = Messages()
    text = json.dumps({"return": ["}{" * 10] * 300_000}).encode()
    for start in range(0, len(text), 4096):
        assert stream.next() is None
        stream.feed(text[start : start + 4096], [])
    found = stream.next()
    assert found is not None
    assert len(found[0]["return"]) == 300_000


# -- paths


def serve_once(listener: socket.socket, *answers: bytes) -> threading.Thread:
    """Accept one connection for each answer, write it, close."""

    def run() -> None:
        for answer in answers:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(answer)
                if answer:
                    connection.recv(1000)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_connects_by_path(tmp_path: Path) -> None:
    """A path, also as a pathlib.Path, names the socket."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        thread = serve_once(listener, NEGOTIATED)
        with Client(tmp_path / "s", timeout=PATIENCE) as client:
            assert "version" in client.greeting
        thread.join()


def test_no_server(tmp_path: Path) -> None:
    """No socket, no listener, or an immediate close: its OSError, at once."""
    with pytest.raises(FileNotFoundError):
        Client(tmp_path / "none")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        with pytest.raises(ConnectionRefusedError):
            Client(tmp_path / "s")
        listener.listen()
        thread = serve_once(listener, b"")
        with pytest.raises(ConnectionResetError):
            Client(tmp_path / "s", timeout=PATIENCE)
        thread.join()


@pytest.mark.usefixtures("no_leak")
def test_wait_tries_again(tmp_path: Path) -> None:
    """With `wait`, a server that drops us while it starts is asked again."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        thread = serve_once(listener, b"", NEGOTIATED)
        with Client(tmp_path / "s", timeout=PATIENCE, wait=PATIENCE) as client:
            assert client.greeting
        thread.join()


def test_the_older_name() -> None:
    """Programs written with gmemd.qmp.client have the same client."""
    assert (gmemd.qmp.client.Client, gmemd.qmp.client.ProtocolError) == (Client, ProtocolError)


@pytest.mark.e2e
@pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="needs qemu-system-x86_64")
def test_real_qemu(tmp_path: Path) -> None:
    """The client drives a real QEMU: version, an object, an fd, oob, an error, the event of quit."""
    command = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", "-S"]
    with Server([*command, "-qmp-pretty", "{address},server=on,wait=off"]) as qemu:
        with Client(qemu.sock, timeout=PATIENCE, oob=True) as client:
            assert client.oob is True
            assert client.execute("query-version")["qemu"]["major"] >= 7
            assert len(client.execute("query-qmp-schema")) > 500
            client.execute("object-add", {"qom-type": "memory-backend-ram", "id": "m0", "size": 4096})
            assert [memdev["id"] for memdev in client.execute("query-memdev")] == ["m0"]
            assert isinstance(client.execute("query-yank", oob=True), list)
            with (tmp_path / "f").open("w") as file:
                assert client.execute("getfd", {"fdname": "f"}, fds=[file.fileno()]) == {}
            with pytest.raises(QmpError, match="object 'm1' not found"):
                client.execute("object-del", {"id": "m1"})
            client.execute("quit")
            assert client.wait_event("SHUTDOWN")["data"]["reason"] == "host-qmp-quit"
        assert qemu.wait() == 0
