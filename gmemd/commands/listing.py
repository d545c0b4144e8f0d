"""Lists of any length as answers: a long one is generated and encoded in short turns, with others served in between.

The data may change meanwhile, so a long list does not show one moment.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from gmemd.changes.pace import Pace
from gmemd.qmp.encode import encode

SHORT: Final = 100  # rows that are generated at once


def listed(rows: Iterable[Any], count: int, **around: Any) -> Any:
    """The answer made of `rows`, about `count` JSON values, or with them as a member.

    `around`: that member, given as ..., and the others.
    """
    if count > SHORT:
        return in_turns(rows, Pace(), **around)
    made = list(rows)
    return {name: made if value is ... else value for name, value in around.items()} if around else made


async def in_turns(rows: Iterable[Any], pace: Pace, **around: Any) -> bytes:
    """The same, encoded, for any number of rows, which may also be `bytes` that are JSON already."""
    made, separator = bytearray(b"["), b""
    for row in rows:
        made += separator
        made += row if type(row) is bytes else encode(row)
        separator = b", "
        await pace.keep()
    text = bytes(made + b"]")
    if not around:
        return text
    name = next(name for name, value in around.items() if value is ...)
    label = encode(name)
    before, _, behind = encode({**around, name: []}).partition(b"%b: []" % label)
    return b"%b%b: %b%b" % (before, label, text, behind)
