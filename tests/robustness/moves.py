"""Strike a move between two gmemd: at every message either daemon, either worker or the line; at system calls a daemon.

Between the two is a line of ours, which knows where a message ends. Afterwards at most one side hands the object out;
when the sides have asked each other, exactly one, with every byte, and it stays so over another kill of both.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from struct import unpack_from
from types import TracebackType
from typing import Any, Final, Self

from gmemd.client.client import Client
from gmemd.client.running import children
from gmemd.errors import QmpError
from tests.patience import PATIENCE
from tests.robustness.world import Link, World, Wrong

SIZE: Final = 256 << 10
PAGE: Final = 4096
CONTENT: Final = b"".join(bytes([65 + number if number % 7 else 0]) * PAGE for number in range(SIZE // PAGE))
ENDS: Final = ("source", "destination", "source's worker", "destination's worker", "line")
MESSAGES: Final = ("HEAD", "TAKE", "DATA", "DATA", "DATA", "DATA", "ENDS", "DURA", "YOUR", "DONE")
_HEADER: Final = 40
_AWAY: Final = ("moved", "prepared")

Strike = Callable[[int, str], None]  # (number of the message from 0 on, "before" or "after" it arrives)


class Wire:
    """A line in two halves, each with its own thread; `strike` is called around each message."""

    def __init__(self, strike: Strike = lambda number, when: None) -> None:
        self.seen: list[str] = []  # kinds of messages
        self._strike = strike
        self._lock = threading.Lock()
        (self.source, one), (self.destination, other) = socket.socketpair(), socket.socketpair()
        self._halves = (one, other)
        self._threads = [threading.Thread(target=self._forward, args=pair) for pair in ((one, other), (other, one))]
        for thread in self._threads:
            thread.start()

    def cut(self) -> None:
        """End it in both directions, for both sides."""
        for half in self._halves:
            with suppress(OSError):
                half.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.cut()
        for thread in self._threads:
            thread.join(PATIENCE)
        for half in (*self._halves, self.source, self.destination):
            half.close()

    def _forward(self, here: socket.socket, there: socket.socket) -> None:
        with suppress(OSError):
            while message := _message(here):
                with self._lock:
                    number = len(self.seen)
                    self.seen.append(message[:4].decode())
                    self._strike(number, "before")
                    there.sendall(message)
                    self._strike(number, "after")
        with suppress(OSError):
            there.shutdown(socket.SHUT_WR)


def _message(sock: socket.socket) -> bytes:
    """The next message; b"": there is none."""
    header = _exactly(sock, _HEADER)
    if len(header) < _HEADER:
        return b""
    pages, _, where = unpack_from(">HHQ", header, 4)
    length = pages.bit_count() * PAGE if header.startswith(b"DATA") else where
    return header + _exactly(sock, length)


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (more := sock.recv(count - len(data))):
        data += more
    return data


class Pair:
    """Two kept daemons. In the `with` block."""

    def __init__(self) -> None:
        self.source = World()
        try:
            self.destination = World()
        except BaseException:
            self.source.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.source.close()
        self.destination.close()

    # -- striking --------------------------------------------------------------------------------------------

    def strike_message(self, at: int, when: str, end: str, asks: str) -> list[str]:
        """Strike at a message; the kinds of the messages that were sent. Wrong: what is left is not as promised."""
        self.prepare()
        seen = self.attempt(at, when, end)
        self.judge(asks)
        return seen

    def attempt(self, at: int, when: str, end: str) -> list[str]:
        """Move once, struck at a message; the kinds of the messages that were sent."""
        wire = Wire(lambda number, moment: self._end(end, wire) if (number, moment) == (at, when) else None)
        try:
            self._begin(wire)
            self._wait_ends()
        finally:
            wire.close()
        return wire.seen

    def strike_call(self, at: int, side: str, asks: str) -> tuple[str, int]:
        """Kill one side's daemon at a system call; which one it was, and how many calls there were."""
        self.prepare()
        wire = Wire()
        world = self.source if side == "source" else self.destination
        other = self.destination if side == "source" else self.source
        mine, theirs = (self._move(), self._import()) if side == "source" else (self._import(), self._move())
        link = Link(world.socket)
        try:
            with other.client() as client:
                self._run(client, {**theirs, "job-id": "move"}, wire.destination if side == "source" else wire.source)
            fd = (wire.source if side == "source" else wire.destination)
            command = mine.pop("command")
            outcome = world.trace(link, [("getfd", {"fdname": "line"}), (command, mine)], [fd.fileno()], at=at)
            if outcome.hung:
                raise Wrong(f"it hangs at call {at} ({outcome.hit})")
        finally:
            link.close()
            wire.source.close()
            wire.destination.close()
            wire.close()
        self._wait_ends()
        self.judge(asks)
        return outcome.hit, len(outcome.calls)

    def _end(self, what: str, wire: Wire) -> None:
        world = self.source if what.startswith("source") else self.destination
        if what == "line":
            wire.cut()
        elif what.endswith("worker"):
            for child in children(world.daemon()):
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
        else:
            world.kill()

    # -- acting ----------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """An object at the source, and nothing at the destination."""
        for world in (self.source, self.destination):
            with world.client() as client:
                left = [*client.execute("query-memdev"), *client.execute("query-memdev-moves")]
                for object_id in {entry["id"] for entry in left}:
                    client.execute("object-del", {"id": object_id})
                for job in client.execute("query-jobs"):
                    client.execute("job-dismiss", {"id": job["id"]})
        with self.source.client() as client:
            client.execute("object-add", {"qom-type": "memory-backend-memfd", "id": "x", "size": SIZE, "share": True})
            _, [fd] = client.execute_fds("memdev-get-fd", {"id": "x"})
            os.pwrite(fd, CONTENT, 0)
            os.close(fd)

    def _move(self) -> dict[str, Any]:
        return {"command": "memdev-move", "id": "x", "fdname": "line", "to": "the destination", "rounds": 1}

    def _import(self) -> dict[str, Any]:
        return {"command": "memdev-import", "fdname": "line", "answers": "line"}

    def _run(self, client: Client, arguments: dict[str, Any], line: socket.socket) -> None:
        command = arguments.pop("command")
        client.execute("getfd", {"fdname": "line"}, fds=[line.fileno()])
        client.execute(command, arguments)

    def _begin(self, wire: Wire) -> None:
        with self.destination.client() as there, self.source.client() as here:
            for client in (there, here):
                for job in client.execute("query-jobs"):
                    client.execute("job-dismiss", {"id": job["id"]})
            self._run(there, {**self._import(), "job-id": "move"}, wire.destination)
            wire.destination.close()
            self._run(here, {**self._move(), "job-id": "move"}, wire.source)
            wire.source.close()

    def _wait_ends(self) -> None:
        """Wait until no job runs on either side; one may be killed meanwhile."""
        until = time.monotonic() + PATIENCE
        for _, world in self._worlds():
            while _jobs(world) != {"concluded"}:
                if time.monotonic() > until:
                    raise Wrong("a job does not end")
                time.sleep(0.01)

    # -- judging ---------------------------------------------------------------------------------------------

    def judge(self, asks: str) -> None:
        owners, states = self._owners(), self.states()
        if len(owners) == 2 or (not owners and states != {"source": "moved", "destination": "prepared"}):
            raise Wrong(f"owned by {owners}, {states}")
        for _ in range(2):
            for side in (("source", "destination") if asks == "source" else ("destination", "source")):
                if self.states().get(side) in _AWAY:
                    self._ask(side)
        self._judge_end()
        for world in (self.source, self.destination):
            world.kill()
        self._judge_end()

    def _judge_end(self) -> None:
        owners, states = self._owners(), self.states()
        if len(owners) != 1:
            raise Wrong(f"owned by {owners} in the end, {states}")
        if any(state in _AWAY for state in states.values()):
            raise Wrong(f"not ended: {states}")
        if owners == ["destination"] and states["source"] != "gone":
            raise Wrong(f"the source is {states['source']}, without a tombstone")

    def _ask(self, side: str) -> None:
        """One side asks the other."""
        asking, asked = self.source, self.destination
        if side == "destination":
            asking, asked = asked, asking
        ours, theirs = socket.socketpair()
        with ours, theirs, asking.client() as client, asked.client() as other:
            self._run(other, {**self._import(), "job-id": f"ask-{time.monotonic_ns()}"}, theirs)
            theirs.close()
            self._run(client, {"command": "memdev-move-resolve", "id": "x", "fdname": "line"}, ours)
        self._wait_ends()

    def _owners(self) -> list[str]:
        return [name for name, world in self._worlds() if self._hands_out(world)]

    def _hands_out(self, world: World) -> bool:
        """Whether a side hands the object out; then it is whole."""
        with world.client() as client:
            try:
                _, [fd] = client.execute_fds("memdev-get-fd", {"id": "x"})
            except QmpError:
                return False
        content = os.pread(fd, SIZE, 0)
        os.close(fd)
        if content != CONTENT:
            raise Wrong("bytes are missing")
        return True

    def states(self) -> dict[str, str]:
        found = {}
        for name, world in self._worlds():
            with world.client() as client:
                for move in client.execute("query-memdev-moves"):
                    found[name] = str(move["state"])
        return found

    def _worlds(self) -> Iterator[tuple[str, World]]:
        yield "source", self.source
        yield "destination", self.destination


def _jobs(world: World) -> set[str]:
    """The states of the jobs; a daemon that is killed has none when it is back."""
    with suppress(ConnectionError), world.client() as client:
        return {job["status"] for job in client.execute("query-jobs")} or {"concluded"}
    return set()


def every_message() -> Iterator[tuple[int, str, str, str]]:
    """(message, moment, what ends, who asks)."""
    for at in range(len(MESSAGES)):
        for when in ("before", "after"):
            for number, end in enumerate(ENDS):
                yield at, when, end, ("source", "destination")[(at + number) % 2]
