"""What one client's work makes another wait for, what is slow at first, and what large answers cost."""

from __future__ import annotations

import http.client
import json
import os
import socket
import statistics
import subprocess
import time
from collections.abc import Callable

from measure import GIB, Measure, Sample
from servers import BINARIES, CLIENT_CPU, Client, Server, on_cpus, run_client

from gmemd.client.client import Client as Qmp

_PING = '{"execute":"query-version"}'
_AROUND = 0.2  # seconds of pings before and after

Work = Callable[[], object]
Prepare = Callable[[Server, float], Work]  # makes what the work needs; scale: the part of it that is wanted


def worst_ping(prepare: Prepare) -> Measure:
    """The longest ping of one client during another one's work; milliseconds. The server is not pinned."""

    def measure(name: str, scale: float) -> Sample:
        with Server(name, pinned=False) as server:
            work = prepare(server, scale)
            server.wait_idle()
            with on_cpus({CLIENT_CPU}):
                pinger = subprocess.Popen([BINARIES / "client", "-n", "100000000", "-t", "60", server.socket, _PING],
                                          stdout=subprocess.PIPE, text=True)
            time.sleep(_AROUND)
            work()
            time.sleep(_AROUND)
            pinger.terminate()
            return Sample(json.loads(pinger.communicate()[0])["max"] / 1e3)

    return measure


def while_loading(key: str, *, divisor: float) -> Measure:
    """`key` of what the C client prints of pings in the first half second, over `divisor`. The server is not pinned."""

    def measure(name: str, scale: float) -> Sample:
        with Server(name, pinned=False) as server:
            result = run_client(server, ["-n", "1000000", "-t", "0.5"], [_PING], cpus={CLIENT_CPU})
        return Sample(result[key] / divisor)

    return measure


def nothing(server: Server, scale: float) -> Work:
    return lambda: time.sleep(0.5)


def deleting(server: Server, scale: float) -> Work:
    """An object-del of 4 GiB that are populated."""
    client = Client(server.socket)
    client.ask("object-add", {"qom-type": "memory-backend-memfd", "id": "big", "size": _size(scale), "share": True,
                              "prealloc": True})
    return lambda: client.ask("object-del", {"id": "big"})


def closing(server: Server, scale: float) -> Work:
    """A closefd of the last descriptor of as much."""
    client = Qmp(server.socket)
    fd = os.memfd_create("bench")
    os.posix_fallocate(fd, 0, _size(scale))
    client.execute("getfd", {"fdname": "big"}, fds=[fd])
    os.close(fd)
    return lambda: client.execute("closefd", {"fdname": "big"})


def _size(scale: float) -> int:
    return 4 * GIB if scale == 1 else GIB


def filled(count: int, line: str, command: str, per_object: str = "") -> Prepare:
    """A command while there are `count` objects made by `line`; `per_object` is the JSON of an argument's parts."""

    def prepare(server: Server, scale: float) -> Work:
        _fill(server, count, line)
        parts = ",".join(per_object.replace("@", str(number)) for number in range(count))
        client = Raw(server)
        return lambda: client.ask(command.replace("[]", f"[{parts}]"))

    return prepare


def refusing(line: str) -> Prepare:
    """The first refusal of a line."""

    def prepare(server: Server, scale: float) -> Work:
        client = Raw(server)
        return lambda: client.ask(line)

    return prepare


def _fill(server: Server, count: int, line: str) -> None:
    if count:
        run_client(server, ["-n", "1", "-g", str(count), "-a", line], [_PING], cpus={CLIENT_CPU})


class Raw:
    """A client that does not look at the answers, only waits for their end."""

    def __init__(self, server: Server) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(server.socket)
        self._lines = self._socket.makefile("rb", 1 << 20)
        self._lines.readline()
        self.ask('{"execute":"qmp_capabilities"}')

    def ask(self, line: str) -> None:
        self._socket.sendall(line.encode() + b"\n")
        while self._lines.readline().startswith(b'{"timestamp"'):
            pass


def first(line: str, *, warm: bool) -> Measure:
    """Time of the first command of a fresh server; `warm`: after it has loaded what it loads ahead; milliseconds."""

    def measure(name: str, scale: float) -> Sample:
        with Server(name) as server:
            client = Raw(server)
            if warm:
                server.wait_idle()
            start = time.perf_counter()
            client.ask(line)
            return Sample((time.perf_counter() - start) * 1e3)

    return measure


def listing(count: int, line: str, *words: str) -> Measure:
    """CPU time of the server for a verb of gmemctl while there are `count` objects; milliseconds."""

    def measure(name: str, scale: float) -> Sample:
        with Server(name) as server:
            _fill(server, count, line)
            server.gmemctl(*words)
            server.wait_idle()
            taken = []
            for _ in range(3):
                before = server.cpu_seconds()
                server.gmemctl(*words)
                taken.append(server.cpu_seconds() - before)
        return Sample(statistics.median(taken) * 1e3)

    return measure


def viewing(count: int, line: str, path: str = "/") -> Measure:
    """Time of the first answer to `path` by HTTP while there are `count` objects; milliseconds."""

    def measure(name: str, scale: float) -> Sample:
        with Server(name, pinned=False) as server:
            _fill(server, count, line)
            server.wait_idle()
            before, start = server.cpu_seconds(), time.perf_counter()
            connection = http.client.HTTPConnection("localhost")
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.connect(server.http)
            connection.request("GET", path)
            connection.getresponse().read()
            taken = time.perf_counter() - start
            used = server.cpu_seconds() - before
            connection.close()
        return Sample(taken * 1e3, server_us=used * 1e6)

    return measure
