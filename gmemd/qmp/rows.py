"""Long answers: many objects with the same members, and values of which each part is written once and never moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import count
from operator import itemgetter
from typing import Any, Final

from gmemd.qmp.encode import encode, member_order

PIECE: Final = 64 << 10  # bytes, about


class Pieces(list[bytearray]):
    """An encoded value in pieces, at least one.

    Whoever joins them holds up everybody: 10 MiB take 3 ms each time they are copied.
    """


class Form:
    """Writes objects that have the same members, as `encode` does; what is the same in all is encoded once."""

    def __init__(self, members: Mapping[str, Any]) -> None:
        """`members`, in the order in which they would be inserted: the value or, where that varies, which it must in at
        least two, `int`, or `bytes` for a value that is JSON already; in objects inside, too."""
        places: list[int] = []  # of the values, in the order in which they are written
        self._text = _written(members, count(), places)
        self._in_order: Callable[[tuple[int | bytes, ...]], tuple[int | bytes, ...]] = itemgetter(*places)

    def write(self, *values: int | bytes) -> bytes:
        """An object with these values, in the order of the members."""
        return self._text % self._in_order(values)


def _written(members: Mapping[str, Any], numbers: Iterator[int], places: list[int]) -> bytes:
    """The object as a format; `numbers` those of the values from here on."""
    parts = {name: _part(value, numbers) for name, value in members.items()}
    for name in (order := member_order(members)):
        places += parts[name][1]
    return b"{%b}" % b", ".join([_fixed(name) + b": " + parts[name][0] for name in order])


def _part(value: Any, numbers: Iterator[int]) -> tuple[bytes, list[int]]:
    """A member's value as a format, and the numbers of the values in it."""
    places: list[int] = []
    if value is int or value is bytes:
        return b"%d" if value is int else b"%b", [next(numbers)]
    return (_written(value, numbers, places) if type(value) is dict else _fixed(value)), places


def _fixed(value: Any) -> bytes:
    return encode(value).replace(b"%", b"%%")
