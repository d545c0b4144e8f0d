"""Lists of any length as answers: a long one is generated and encoded in short turns, with others served in between.

The data may change meanwhile, so a long list does not show one moment.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from gmemd.changes.pace import Pace
from gmemd.qmp.encode import encode
from gmemd.qmp.rows import PIECE, Pieces

SHORT: Final = 100  # rows that are generated at once


def listed(rows: Iterable[Any], count: int, **around: Any) -> Any:
    """The answer made of `rows`, about `count` JSON values, or with them as a member.

    `around`: that member, given as ..., and the others.
    """
    if count > SHORT:
        return in_turns(rows, Pace(), **around)
    made = list(rows)
    return {name: made if value is ... else value for name, value in around.items()} if around else made


async def in_turns(rows: Iterable[Any], pace: Pace, **around: Any) -> Pieces:
    """The same, encoded, for any number of rows, which may also be `bytes`: one or more that are JSON already, with
    ", " in between."""
    before, behind = _around(around) if around else (b"", b"")
    pieces, made, separator = Pieces(), bytearray(before + b"["), b""
    for row in rows:
        made += separator
        made += row if type(row) is bytes else encode(row)
        separator = b", "
        if len(made) >= PIECE:
            pieces.append(made)
            made = bytearray()
        await pace.keep()
    made += b"]" + behind
    pieces.append(made)
    return pieces


def _around(members: dict[str, Any]) -> tuple[bytes, bytes]:
    """What is before and behind the rows, where they are the member given as ..."""
    name = next(name for name, value in members.items() if value is ...)
    label = encode(name) + b": "
    before, _, behind = encode({**members, name: []}).partition(label + b"[]")
    return before + label, behind
