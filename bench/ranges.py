"""Measures of a sparse guest_memfd of 1 TiB in which 10,000 scattered pages are made private."""

from __future__ import annotations

import json
import random
import statistics
import time

from measure import Measure, Sample
from servers import Client, Server
from stalls import Prepare, Raw, Work

_TIB = 1 << 40
_PAGE = 4096
_COUNT = 10_000
_ROUNDS = 5
_CONVERT = "memdev-convert"


def _scattered(scale: float) -> list[dict[str, object]]:
    """The arguments of the conversions: no two pages are neighbours."""
    places = random.Random(4).sample(range(_TIB // _PAGE // 2), max(1000, int(_COUNT * scale)))
    return [{"id": "big", "offset": 2 * _PAGE * place, "size": _PAGE, "to": "private"} for place in places]


def _make(client: Client) -> None:
    client.ask("object-add", {"qom-type": "memory-backend-guest-memfd", "id": "big", "size": _TIB})


def creating() -> Measure:
    """Time of the object-add; milliseconds."""

    def measure(name: str, scale: float) -> Sample:
        with Server(name) as server:
            client = Client(server.socket)
            client.ask("object-add", {"qom-type": "memory-backend-guest-memfd", "id": "first", "size": _PAGE})
            start = time.perf_counter()
            _make(client)
            taken = time.perf_counter() - start
            client.close()
        return Sample(taken * 1e3)

    return measure


def converting() -> Measure:
    """Time of a conversion while all of them are there but the last tenth, p50; milliseconds."""

    def measure(name: str, scale: float) -> Sample:
        taken = []
        with Server(name) as server:
            client = Client(server.socket)
            _make(client)
            for arguments in _scattered(scale):
                start = time.perf_counter()
                client.ask(_CONVERT, arguments)
                taken.append(time.perf_counter() - start)
            client.close()
        return Sample(statistics.median(taken[-len(taken) // 10:]) * 1e3)

    return measure


def filling(line: str) -> Prepare:
    """A line while all of them are there."""

    def prepare(server: Server, scale: float) -> Work:
        client = Client(server.socket)
        _make(client)
        for arguments in _scattered(scale):
            client.ask(_CONVERT, arguments)
        raw = Raw(server)
        return lambda: raw.ask(line)

    return prepare


def listing(part: float = 1) -> Measure:
    """Time of a query-memdev-ranges over `part` of the object; milliseconds."""
    line = json.dumps({"execute": "query-memdev-ranges", "arguments": {"id": "big", "size": int(_TIB * part)}})

    def measure(name: str, scale: float) -> Sample:
        taken = []
        with Server(name) as server:
            ask = filling(line)(server, scale)
            before = server.cpu_seconds()
            for _ in range(_ROUNDS):
                start = time.perf_counter()
                ask()
                taken.append(time.perf_counter() - start)
            used = server.cpu_seconds() - before
        return Sample(statistics.median(taken) * 1e3, server_us=used / _ROUNDS * 1e6)

    return measure


def growth() -> Measure:
    """By how much the conversions make the server grow; MiB."""

    def measure(name: str, scale: float) -> Sample:
        with Server(name) as server:
            client = Client(server.socket)
            _make(client)
            before = server.rss()
            for arguments in _scattered(scale):
                client.ask(_CONVERT, arguments)
            grown = server.rss() - before
            client.close()
        return Sample(grown / 2**20)

    return measure
