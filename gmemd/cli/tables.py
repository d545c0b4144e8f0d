"""Tables as lines of text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple


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
        right = [name in self.numbers for name in self.header] or [False] * len(widths)
        return "\n".join(
            "  ".join(
                cell.rjust(width) if to_right else cell.ljust(width)
                for cell, width, to_right in zip(line, widths, right, strict=True)
            ).rstrip()
            for line in self.lines
        )


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[str] = ()) -> Table:
    """Return a table."""
    return Table(header, list(rows), numbers)


def fields(pairs: Iterable[tuple[str, str]]) -> Table:
    """Return a table without header: one line for each name and text."""
    return Table((), list(pairs))
