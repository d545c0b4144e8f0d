"""The selector under the event loop, compared with the standard library's; readers that it calls; no TLS."""

from __future__ import annotations

import asyncio
import contextlib
import os
import selectors
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from selectors import EVENT_READ, EVENT_WRITE, BaseSelector

import pytest

from gmemd.server.loop import Loop, run
from gmemd.server.selector import Selector
from tests.programs import ROOT

BOTH = EVENT_READ | EVENT_WRITE


@pytest.fixture(params=[Selector, selectors.EpollSelector])
def selector(request: pytest.FixtureRequest) -> Iterator[BaseSelector]:
    with contextlib.closing(request.param()) as made:
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


def test_it_looks_again_before_it_sleeps_while_that_is_worth_it(pair: tuple[socket.socket, socket.socket]) -> None:
    """It stops when nothing has come several times, and begins again when a rare try finds something."""
    ours, theirs = pair
    with contextlib.closing(Selector()) as selector:
        selector.register(ours.fileno(), EVENT_READ)
        for _ in range(100):
            selector.look()
        assert selector.tries < 0
        theirs.send(b"x")
        for _ in range(100):
            selector.look()
        assert selector.tries > 1


def test_what_could_not_be_unregistered_is_registered_again(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    fd = ours.fileno()
    with contextlib.closing(Selector()) as selector:
        selector.register(fd, EVENT_WRITE, "before")
        del selector._keys[fd]  # as after an epoll_ctl(2) that failed
        selector.register(fd, EVENT_READ, "after")
        assert happened(selector) == []
        theirs.send(b"x")
        assert happened(selector) == [(fd, EVENT_READ, "after")]


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


# -- readers, called from the selector ---------------------------------------------------------------

class Fallback(Loop):
    """On a Python whose asyncio has other private names."""

    private = ("_no_such_name",)


@pytest.fixture(params=[Loop, Fallback])
def loop(request: pytest.FixtureRequest) -> Iterator[Loop]:
    with contextlib.closing(request.param()) as made:
        yield made


class Echo:
    """A reader that makes its own descriptor readable again, until it has been called `most` times."""

    def __init__(self, loop: Loop, pair: tuple[socket.socket, socket.socket], most: int) -> None:
        self.times = 0
        self._loop, self._most = loop, most
        self._ours, self._theirs = pair
        self._theirs.send(b"x")
        loop.add_reader(self._ours.fileno(), self._read)

    def _read(self) -> None:
        self._ours.recv(1)
        self.times += 1
        if self.times == self._most:
            self._loop.remove_reader(self._ours.fileno())
            self._loop.stop()
        else:
            self._theirs.send(b"x")


def count_turns(loop: Loop) -> list[int]:
    """The number of events of each of asyncio's turns."""
    turns: list[int] = []
    process = loop._process_events  # type: ignore[attr-defined]

    def counted(events: list[object]) -> None:
        turns.append(len(events))
        process(events)

    loop._process_events = counted  # type: ignore[attr-defined]
    return turns


def test_this_asyncio_has_the_private_names() -> None:
    """Where this fails gmemd works, but slower: look up in asyncio/base_events.py what the names have become."""
    with contextlib.closing(Loop()) as loop:
        assert list(loop._ready) == []
        due = loop.call_soon(int)
        assert list(loop._ready) == [due]
        assert loop._scheduled == []
        later = loop.call_later(60, int)
        sooner = loop.call_later(30, int)
        assert loop._scheduled[0] is sooner
        sooner.cancel()
        later.cancel()
        assert loop._stopping is False
        loop.stop()
        assert loop._stopping is True


def test_a_reader_takes_no_turn(pair: tuple[socket.socket, socket.socket]) -> None:
    """A client that waits for each answer is served without asyncio, which has a turn now and then."""
    with contextlib.closing(Loop()) as loop:
        echo, turns = Echo(loop, pair, most=200), count_turns(loop)
        loop.run_forever()
    assert echo.times == 200
    assert turns == [0, 0, 0, 0]


def test_a_reader_without_the_private_names(pair: tuple[socket.socket, socket.socket]) -> None:
    """asyncio calls it, once in a turn."""
    with contextlib.closing(Fallback()) as loop:
        echo, turns = Echo(loop, pair, most=200), count_turns(loop)
        loop.run_forever()
    assert echo.times == 200
    assert turns == [1] * 200


def test_callbacks_and_timers_are_not_kept_waiting(loop: Loop, pair: tuple[socket.socket, socket.socket]) -> None:
    """What a reader or a thread has asyncio do, and what is due, comes before the next round of readers."""
    seen: list[str] = []
    Echo(loop, pair, most=1 << 30)  # always ready
    loop.call_later(0.001, seen.append, "timer")
    thread = threading.Thread(target=loop.call_soon_threadsafe, args=(seen.append, "thread"))
    thread.start()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        loop.add_reader(ours.fileno(), lambda: (ours.recv(1), loop.call_soon(seen.append, "reader")))
        theirs.send(b"x")

        async def all_seen() -> None:
            while len(seen) < 3:
                await asyncio.sleep(0)

        loop.run_until_complete(all_seen())
        loop.remove_reader(ours.fileno())
    thread.join()
    assert sorted(seen) == ["reader", "thread", "timer"]


def test_a_removed_reader_is_not_called(loop: Loop, pair: tuple[socket.socket, socket.socket]) -> None:
    """Also if both were ready at the same time and the other one has removed it."""
    called: list[socket.socket] = []

    def read(own: socket.socket, other: socket.socket) -> None:
        called.append(own)
        own.recv(1)
        loop.remove_reader(other.fileno())
        loop.stop()

    for own, other in (pair, pair[::-1]):
        loop.add_reader(own.fileno(), partial(read, own, other))
        other.send(b"x")
    loop.run_forever()
    assert len(called) == 1


def test_the_end_comes_in_the_order_of_events(loop: Loop, pair: tuple[socket.socket, socket.socket]) -> None:
    """Who has hung up is gone before whoever comes next is let in."""
    seen: list[str] = []

    def read(name: str, sock: socket.socket) -> None:
        seen.append(name)
        loop.remove_reader(sock.fileno())

    first, other_end = socket.socketpair()
    with first:
        loop.add_reader(pair[0].fileno(), partial(read, "next", pair[0]))
        loop.add_reader(first.fileno(), partial(read, "first", first))
        other_end.close()
        pair[1].send(b"x")
        run_once(loop)
    assert seen == ["first", "next"]


def test_what_is_called_after_readers(loop: Loop, pair: tuple[socket.socket, socket.socket]) -> None:
    """Each time, whoever has become readable comes first; an error is told and stops nobody."""
    seen: list[str] = []
    told: list[object] = []
    loop.set_exception_handler(lambda _, context: told.append(context["exception"]))
    loop.add_reader(pair[0].fileno(), lambda: seen.append(pair[0].recv(1).decode()))

    def later(name: str) -> None:
        seen.append(name)
        pair[1].send(name.upper().encode())
        if name == "b":
            loop.call_soon(loop.call_soon, loop.stop)

    pair[1].send(b"0")
    loop.call_after_readers(partial(later, "a"))
    if not loop._calls_readers:
        run_once(loop)
        run_once(loop)
    loop.call_after_readers(partial(int, "not a number"))
    loop.call_after_readers(partial(later, "b"))
    loop.run_forever()
    assert seen == ["0", "a", "A", "b", "B"]
    assert [type(error) for error in told] == [ValueError]


def test_an_error_of_a_reader_is_told(loop: Loop, pair: tuple[socket.socket, socket.socket]) -> None:
    """To the loop's handler of exceptions, and the loop goes on."""
    told: list[BaseException] = []
    loop.set_exception_handler(lambda _, context: (told.append(context["exception"]), loop.stop()))
    loop.add_reader(pair[0].fileno(), partial(int, "not a number"))
    pair[1].send(b"x")
    loop.run_forever()
    assert [type(error) for error in told] == [ValueError]
    loop.remove_reader(pair[0].fileno())
    run_once(loop)
    assert len(told) == 1


def test_a_reader_beside_a_writer(loop: Loop, pair: tuple[socket.socket, socket.socket]) -> None:
    """Both of a descriptor are called; one is removed without the other."""
    ours, theirs = pair
    seen: list[str] = []
    loop.add_reader(ours.fileno(), lambda: seen.append(f"read {ours.recv(1)!r}"))
    loop.add_writer(ours.fileno(), seen.append, "write")
    theirs.send(b"x")
    run_once(loop)
    assert sorted(seen) == ["read b'x'", "write"]
    loop.remove_writer(ours.fileno())
    theirs.send(b"y")
    run_once(loop)
    assert seen[2:] == ["read b'y'"]
    assert loop.remove_reader(ours.fileno())
    assert not loop.remove_reader(ours.fileno())
    theirs.send(b"z")
    run_once(loop)
    assert len(seen) == 3


def run_once(loop: Loop) -> None:
    """One look at the descriptors, and the callbacks of what is found."""
    loop.call_soon(loop.stop)
    loop.run_forever()


def test_asyncio_without_what_it_rarely_needs() -> None:
    """A loop with signals and tasks loads none of it; what goes wrong is told by the real modules."""
    code = """
import os, signal, sys
from gmemd.server.loop import asyncio, run
rare = {"ssl", "inspect", "logging", "subprocess", "traceback", "concurrent.futures", "asyncio.streams"}

async def main():
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stopped.set)
    os.kill(os.getpid(), signal.SIGTERM)
    await stopped.wait()
    await asyncio.gather(asyncio.sleep(0), asyncio.create_task(asyncio.sleep(0)))
    print(sorted(rare & set(sys.modules)))
    loop.call_exception_handler({"message": "something is wrong"})
    async def callback(): pass
    try:
        loop.add_signal_handler(signal.SIGUSR1, callback)
    except TypeError as exc:
        print(exc)
    print(sorted({"logging"} & set(sys.modules)))

run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "COVERAGE_PROCESS_CONFIG": ""})
    assert done.stdout.splitlines() == ["[]", "coroutines cannot be used with add_signal_handler()", "['logging']"]
    assert "something is wrong" in done.stderr
