"""Values for people (tables, binary units) and for programs (JSON, exact)."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

# Members that count bytes: in query-qmp-schema a size is an int like any other.
BYTES = frozenset(("size", "resident", "hugetlbsize", "align", "offset", "base-memory", "plugged-memory"))
LONG = 200  # rows; rich takes a millisecond for each
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


class Table(NamedTuple):
    """Rows of cells; the columns named in `numbers` are right-aligned. Without a header each row is a member."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[str] = ()

    @property
    def lines(self) -> Sequence[Sequence[str]]:
        return [self.header, *self.rows] if self.header else self.rows

    @property
    def widths(self) -> list[int]:
        return [max(map(len, column)) for column in zip(*self.lines, strict=True)]

    def __str__(self) -> str:
        """Return lines of columns two blanks apart."""
        widths = self.widths
        to_right = [name in self.numbers for name in self.header] or [False] * len(widths)
        padded = ([cell.rjust(width) if right else cell.ljust(width)
                   for cell, width, right in zip(line, widths, to_right, strict=True)] for line in self.lines)
        return "\n".join("  ".join(cells).rstrip() for cells in padded)


def as_line(value: Any) -> str:
    """Return JSON on one line, exact."""
    return json.dumps(value, ensure_ascii=False)


def size(number: int | None) -> str:
    """Return bytes in a suitable unit, with at most one decimal: 64 MiB, 1.5 GiB; "?" if unknown."""
    if number is None:
        return "?"
    unit = 0
    while abs(number) >= 1 << 10 * (unit + 1) and unit < len(_UNITS) - 1:
        unit += 1
    # in integers: a float would make 2^64-1 a round number
    tenths = (number * 10 + (1 << 10 * unit) // 2) // (1 << 10 * unit)
    text = f"{tenths // 10}" if tenths % 10 == 0 else f"{tenths // 10}.{tenths % 10}"
    return f"{text} {_UNITS[unit]}"


def exact_size(number: int) -> str:
    """Return bytes in both forms if they differ: 1 GiB (1073741824)."""
    return size(number) if number < 1024 else f"{size(number)} ({number})"


def duration(seconds: int) -> str:
    """Return a duration by its two largest units: 3d 4h, 2m 10s, 1h, 7s."""
    for unit, letter, below, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if seconds >= unit:
            rest = seconds % unit // below
            return f"{seconds // unit}{letter}" + (f" {rest}{smaller}" if rest else "")
    return f"{seconds}s"


@cache
def user(uid: int) -> str:
    """Return a user's name, or the number if there is none."""
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def show(what: Table | str) -> None:
    """Print it; on a terminal a table with colours, wrapped to its width, unless it is long."""
    if isinstance(what, Table):
        what = what._replace(rows=[[printable(cell) for cell in row] for row in what.rows])
    if isinstance(what, Table) and 0 < len(what.rows) <= LONG and sys.stdout.isatty():
        from gmemd.cli.terminal import print_table

        if print_table(*what, what.widths):
            return
    print(what)


def value(what: Any, order: Sequence[str] = ()) -> Table | str:
    """Return any command's result for people: a table for a list of objects, lines for an object.

    `order`: the members to begin with; their order on the wire means nothing.
    """
    if isinstance(what, dict):
        return Table((), [(name, cell(name, what[name])) for name in ordered(what, order)])
    if isinstance(what, list) and what and all(isinstance(row, dict) for row in what):
        return _table_of(what, order)
    if isinstance(what, list):
        return "\n".join(cell("", row) for row in what)
    return cell("", what)


def ordered(names: Iterable[str], order: Sequence[str]) -> list[str]:
    """Return the names, once each: those in `order` first, in that order."""
    given = dict.fromkeys(names)
    return list(dict.fromkeys([*(name for name in order if name in given), *given]))


def cell(name: str, what: Any) -> str:
    """Return one member's value on one line."""
    if isinstance(what, str):
        return printable(what)
    if isinstance(what, int) and not isinstance(what, bool) and name in BYTES:
        return size(what)
    return as_line(what)


def printable(text: str) -> str:
    """Return a text with which nobody can control a terminal, whoever wrote it."""
    return text if text.isprintable() else json.dumps(text)


def _table_of(rows: list[dict[str, Any]], order: Sequence[str]) -> Table:
    names = ordered((name for row in rows for name in row), order)
    numbers = [name.upper() for name in names if all(type(row.get(name, 0)) is int for row in rows)]
    cells = [[cell(name, row[name]) if name in row else "" for name in names] for row in rows]
    return Table([name.upper() for name in names], cells, numbers)
