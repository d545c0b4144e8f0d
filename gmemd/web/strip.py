"""The picture of an object's pages: a column for each cell, from the bottom private pages to absent ones."""

from __future__ import annotations

from itertools import groupby
from typing import Final

from gmemd.memory.cells import KINDS, Cell
from gmemd.web.words import percent

HEIGHT: Final = 16  # units of a column


def strip(cells: list[Cell]) -> str:
    """The picture as HTML."""
    sums = [sum(column) for column in zip(*cells, strict=True)] or [0] * len(KINDS)
    whole = sum(sums)
    words = ("private in memory", "shared in memory", "private and absent", "shared and absent")
    text = ", ".join(f"{percent(part, whole)} {word}" for part, word in zip(sums, words, strict=True) if part)
    drawn = "".join(f'<path class="{kind}" d="{path}"/>' for kind, path in paths(cells).items())
    return (f'<svg class="strip" viewBox="0 0 {max(1, len(cells))} {HEIGHT}" preserveAspectRatio="none" role="img" '
            f'aria-label="Pages: {text}"><title>{text}</title>{drawn}</svg>')


def paths(cells: list[Cell]) -> dict[str, str]:
    """An SVG path for each of KINDS that occurs, in a picture of len(cells) by HEIGHT units."""
    columns = [_column(cell) for cell in cells]
    drawn: dict[str, list[str]] = {}
    at = 0
    for column, group in groupby(columns):
        width, top = len(list(group)), HEIGHT
        for kind, height in zip(KINDS, column, strict=True):
            top -= height
            if height:
                drawn.setdefault(kind, []).append(f"M{at} {top}h{width}v{height}h-{width}z")
        at += width
    return {kind: "".join(path) for kind, path in drawn.items()}


def _column(cell: Cell) -> tuple[int, ...]:
    """Heights that add up to HEIGHT; every part that is not empty gets at least one unit."""
    total = sum(cell)
    heights = [max(1, part * HEIGHT // total) if part else 0 for part in cell]
    heights[heights.index(max(heights))] += HEIGHT - sum(heights)
    return tuple(heights)
