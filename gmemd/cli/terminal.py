"""Tables, colours and progress on a terminal, by rich; imported only there, because that is slower than most verbs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from rich import progress
from rich.console import Console, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table as RichTable
from rich.text import Text

STYLES: Final = {"NO": "bold red", "BAD": "bold red", "note": "yellow", "yes": "green", "ok": "green"}  # by cell
_BAR_WIDTH: Final = 20
_WRAPPED: Final = 20  # columns of the screen; what is narrower is not wrapped


def _console(*, stderr: bool = False) -> Console:
    """Texts come from outside: nothing in them is rich markup."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str],
                widths: Sequence[int]) -> bool:
    """Print a table to standard output, wrapping what does not fit; False: wrapping its last column does not help."""
    *others, last = widths
    console = _console()
    if sum(width + 2 for width in others) + min(last, _WRAPPED) > console.width:
        return False
    console.print(_rich(header, rows, numbers))
    return True


def print_jobs(jobs: Iterable[dict[str, Any]]) -> None:
    """Print what query-jobs returned, with bars."""
    rows = [(job["id"], job["type"], job["status"], _bar(job), job.get("error", "")) for job in jobs]
    _console().print(_rich(("ID", "TYPE", "STATUS", "PROGRESS", "ERROR"), rows))


def clear() -> None:
    _console().clear()


def _rich(header: Sequence[str], rows: Sequence[Sequence[RenderableType]], numbers: Sequence[str] = ()) -> RichTable:
    made = RichTable(box=None, pad_edge=False, show_header=bool(header), header_style="bold")
    last = len(header or rows[0]) - 1
    for column in range(last + 1):
        name = header[column] if header else ""
        made.add_column(Text(name), justify="right" if name in numbers else "left", overflow="fold",
                        no_wrap=column < last, style="" if header or column else "bold")
    for row in rows:
        made.add_row(*(Text(cell, STYLES.get(cell, "")) if isinstance(cell, str) else cell for cell in row))
    return made


def _bar(job: dict[str, Any]) -> RenderableType:
    current, total = job["current-progress"], job["total-progress"] or 1
    bar = RichTable.grid(padding=(0, 1))
    bar.add_row(ProgressBar(total, current, width=_BAR_WIDTH), f"{100 * current // total:3d} %")
    return bar


@contextmanager
def bars() -> Iterator[Callable[[list[dict[str, Any]]], None]]:
    """Yield what draws the result of query-jobs as bars on standard error; they are removed at the end."""
    tasks: dict[str, progress.TaskID] = {}
    columns = (progress.TextColumn("{task.description}", markup=False), progress.BarColumn(),
               progress.TaskProgressColumn(), progress.DownloadColumn(binary_units=True),
               progress.TimeRemainingColumn())
    with progress.Progress(*columns, console=_console(stderr=True), transient=True) as drawn:
        def show(jobs: list[dict[str, Any]]) -> None:
            for job in jobs:
                if job["id"] not in tasks:
                    tasks[job["id"]] = drawn.add_task(job["id"])
                drawn.update(tasks[job["id"]], completed=job["current-progress"], total=job["total-progress"] or 1)

        yield show
