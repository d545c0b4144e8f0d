"""The selector under the event loop, compared with the standard library's; and that TLS is not loaded."""

from __future__ import annotations

import asyncio
import os
import selectors
import socket
import subprocess
import sys
from collections.abc import Iterator
from selectors import EVENT_READ, EVENT_WRITE, BaseSelector

import pytest

from gmemd.server.loop import Loop, Selector, run

BOTH = EVENT_READ | EVENT_WRITE


@pytest.fixture(params=[Selector, selectors.EpollSelector])
def selector(request: pytest.FixtureRequest) -> Iterator[BaseSelector]:
    with request.param() as made:
        yield made


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def happened(selector: BaseSelector) -> list[tuple[int, int, object]]:
    return [(key.fd, events, key.data) for key, events in selector.select(0)]


def test_only_what_is_asked_for_is_told(selector: BaseSelector, pair: tuple[socket.socket, socket.socket]) -> None:
    """Readable, writable or both; what is unregistered is silent."""
    ours, theirs = pair
    fd = ours.fileno()
    selector.register(fd, EVENT_READ, "read")
    assert happened(selector) == []
    theirs.send(b"x")
    assert happened(selector) == [(fd, EVENT_READ, "read")]
    selector.modify(fd, EVENT_WRITE, "write")
    assert happened(selector) == [(fd, EVENT_WRITE, "write")]
    selector.modify(fd, BOTH, "both")
    assert happened(selector) == [(fd, BOTH, "both")]
    assert selector.get_key(fd).data == "both"
    assert selector.unregister(fd).data == "both"
    assert happened(selector) == []


def test_the_end_is_readable_and_writable(selector: BaseSelector, pair: tuple[socket.socket, socket.socket]) -> None:
    """Whoever waits for either learns that the other side is gone."""
    ours, theirs = pair
    theirs.close()
    for events in (EVENT_READ, EVENT_WRITE, BOTH):
        selector.register(ours.fileno(), events)
        assert happened(selector) == [(ours.fileno(), events, None)]
        selector.unregister(ours.fileno())


def test_unknown(selector: BaseSelector, pair: tuple[socket.socket, socket.socket]) -> None:
    """KeyError for a descriptor that is not registered; asyncio relies on it."""
    for ask in (selector.get_key, selector.unregister):
        with pytest.raises(KeyError):
            ask(pair[0].fileno())
    assert list(selector.get_map()) == []


def test_closed_before_it_is_unregistered(selector: BaseSelector) -> None:
    """The kernel has forgotten it already; its number can be used again."""
    ours, theirs = socket.socketpair()
    fd = ours.fileno()
    selector.register(fd, EVENT_READ)
    ours.close()
    selector.unregister(fd)
    theirs.close()
    again, other = os.pipe()
    os.dup2(again, fd)
    selector.register(fd, EVENT_READ)
    assert happened(selector) == []
    for number in {again, other, fd}:
        os.close(number)


def test_closed_here_but_held_elsewhere(selector: BaseSelector, pair: tuple[socket.socket, socket.socket]) -> None:
    """epoll goes on reporting it (epoll(7), "Questions and answers", 6); nobody here listens."""
    ours, theirs = pair
    held = ours.dup()
    selector.register(ours.fileno(), EVENT_READ)
    fd = ours.detach()
    os.close(fd)
    selector.unregister(fd)
    theirs.send(b"x")
    assert happened(selector) == []
    held.close()


def test_what_cannot_be_watched(selector: BaseSelector) -> None:
    """A regular file is refused and leaves nothing behind."""
    with open(__file__, "rb") as file:
        with pytest.raises(PermissionError):
            selector.register(file.fileno(), EVENT_READ)
        assert list(selector.get_map()) == []


def test_run() -> None:
    """asyncio works on it: readers, writers, timers, threads and child processes."""
    seen: list[object] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            theirs.setblocking(False)
            await loop.sock_sendall(theirs, bytes(1 << 20 >> 4))
            seen.append(len(await loop.sock_recv(ours, 16)))
        seen.append(await loop.run_in_executor(None, int, "5"))
        process = await asyncio.create_subprocess_exec("cat", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        seen.append((await process.communicate(b"text"))[0])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 0.001)

    run(main())
    assert seen == [16, 5, b"text"]


def test_tls_is_not_loaded_and_can_be() -> None:
    """The daemon's loop does without ssl; who needs it afterwards gets it."""
    code = ("import sys, gmemd.server.loop, asyncio; print('_ssl' in sys.modules); "
            "import ssl; print(ssl.CERT_NONE.value)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "0"]


def test_the_loop_tells_whether_others_wait() -> None:
    loop = Loop()
    here, there = socket.socketpair()
    with here, there:
        loop.add_reader(here.fileno(), lambda: None)
        assert not loop.awaited(-1)
        there.send(b"x")
        assert loop.awaited(-1)
        assert not loop.awaited(here.fileno())
        loop.remove_reader(here.fileno())
    loop.close()
