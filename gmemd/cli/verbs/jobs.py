"""The verbs about work that takes long: verify, jobs."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

from gmemd.cli.chosen import gather, show_all
from gmemd.cli.connection import DONE, Connection, note
from gmemd.cli.hints import Refusal, listed
from gmemd.cli.parser import DRY_RUN, IDS, Verbs, argument
from gmemd.errors import QmpError

VERBS = Verbs()
_POLL_SECONDS = 0.1


def _jobs_here(refusal: Refusal) -> Iterable[str]:
    yield listed("the jobs here", [job["id"] for job in refusal.ask("query-jobs")]) or "there are no jobs"


@VERBS.add("read objects' memory in a job and show its digests", *IDS, examples=("verify ram0",))
def verify(connection: Connection, options: Namespace) -> int:
    def ask(name: str) -> list[dict[str, Any]]:
        digests: list[dict[str, Any]] = run_job(
            connection, "memdev-verify", {"id": name},
            lambda _, job: connection.execute("query-memdev-digests", {"job-id": job}))
        if not digests:
            note(f"nothing of '{name}' is in memory")
        return digests

    status, found = gather(connection, options, ask)
    show_all(connection, options, found, "query-memdev-digests")
    return status


@VERBS.add(
    "list jobs, follow, cancel or dismiss them",
    argument("--cancel", metavar="JOB", completes="jobs", help="cancel this one"),
    argument("--dismiss", metavar="JOB", completes="jobs", help="remove this one, which has ended, from the list"),
    argument("-f", "--follow", action="store_true", help="show their progress until all have ended"), DRY_RUN,
    examples=("jobs", "jobs -f"),
    hints=(
        (r"^Job not found$", _jobs_here),
        (r"^Job '(.*)' in state 'concluded' cannot accept", "'gmemctl jobs --dismiss {}' removes it"),
        (r"^Job '.*' in state '.*' cannot accept", "'gmemctl jobs -f' waits for its end"),
        (r"^Job ID '(.*)' already in use$",
         "'gmemctl jobs' shows it; once it has ended, 'gmemctl jobs --dismiss {}' removes it"),
        (r"^object '.*' is busy: ", "'gmemctl jobs -f' shows the progress and waits for the end"),
    ))
def jobs(connection: Connection, options: Namespace) -> int:
    for verb in ("cancel", "dismiss"):
        if getattr(options, verb):
            if effect := connection.change(f"job-{verb}", {"id": getattr(options, verb)}):
                connection.show(effect)
            return DONE
    found = _follow(connection) if options.follow else connection.execute("query-jobs")
    if sys.stdout.isatty() and found and connection.for_people:
        from gmemd.cli.terminal import print_jobs

        print_jobs(found)
    else:
        connection.show(found, "query-jobs")
    return DONE


def run_job(connection: Connection, command: str, arguments: dict[str, Any],
            result: Callable[[Any, str], Any] = lambda value, job: value) -> Any:
    """Run a command as a job, with a bar on a terminal; QmpError if it fails. Interrupting us cancels it.

    `result` is made of the command's value and the job's id when the job has ended well, by default the value.
    """
    _, at, room = arguments.get("id", "").partition("@")  # where the job is, too
    job = f"{command.removeprefix('memdev-')}-{time.time_ns():x}{at}{room}"
    value = connection.execute(command, {**arguments, "job-id": job})
    try:
        [state] = _follow(connection, job)
    except KeyboardInterrupt:
        with suppress(QmpError):  # it has just ended
            connection.execute("job-cancel", {"id": job})
        raise
    error = state.get("error")
    found = None if error else result(value, job)
    connection.execute("job-dismiss", {"id": job})
    if error:
        raise QmpError(error)
    return found


def _follow(connection: Connection, job: str = "") -> list[dict[str, Any]]:
    """Wait until a job (all jobs) has ended, with bars on a terminal; its (their) final query-jobs entries."""
    with _bars() as show:
        while True:
            found = [state for state in connection.execute("query-jobs") if job in ("", state["id"])]
            show(found)
            if all(state["status"] == "concluded" for state in found):
                return found
            time.sleep(_POLL_SECONDS)


def _bars() -> AbstractContextManager[Callable[[list[dict[str, Any]]], None]]:
    if not sys.stderr.isatty():
        return nullcontext(lambda jobs: None)
    from gmemd.cli.terminal import bars

    return bars()
