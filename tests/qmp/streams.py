"""Ways to feed a Stream, for its tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any

from gmemd.errors import QmpError
from gmemd.qmp.lexer import Lexer
from gmemd.qmp.parser import Parser
from gmemd.qmp.stream import NEED_DATA, Stream


class SlowStream:
    """The exact path alone."""

    def __init__(self) -> None:
        self._lexer = Lexer()
        self._parser = Parser(self._lexer)
        self.feed = self._lexer.feed
        self.next = self._parser.next


Maker = Callable[[], "Stream | SlowStream"]


def drain(stream: Stream | SlowStream) -> Iterator[Any]:
    """What is ready; errors as their text behind "!"."""
    while (value := stream.next()) is not NEED_DATA:
        yield "!" + value.desc if isinstance(value, QmpError) else value


def read(*chunks: bytes, make: Maker = Stream) -> list[Any]:
    """All that comes of the chunks; each is fed only when the one before is used up."""
    stream = make()
    out: list[Any] = []
    for chunk in chunks:
        stream.feed(chunk)
        out += drain(stream)
    return out


def single_bytes(data: bytes) -> Iterator[bytes]:
    return (data[i : i + 1] for i in range(len(data)))


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


def exactly(value: Any) -> Any:
    """A form in which 1, 1.0 and True, the order of members and NaN all show."""
    return json.dumps(value), repr(value)


def each_way(data: bytes) -> list[Any]:
    """What comes of the data; the same whole, byte by byte and from the exact path alone."""
    whole = read(data)
    assert exactly(whole) == exactly(read(data, make=SlowStream))
    assert exactly(whole) == exactly(read(*single_bytes(data)))
    return whole
