"""The verbs that need no server: doctor, completion, help."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from typing import Any

from gmemd.cli import render
from gmemd.cli.call_syntax import UsageError
from gmemd.cli.connection import DONE, REFUSED, Connection
from gmemd.cli.parser import Verbs, argument, first_words, inner_verbs, verbs_of
from gmemd.errors import QmpError

VERBS = Verbs()
SHELLS = ("bash", "zsh", "fish")
_PATIENCE = 2.0  # seconds; a person is waiting


@VERBS.add("check this host: kernel, KVM, huge pages, limits, systemd, policy", examples=("doctor",))
def doctor(connection: Connection, options: Namespace) -> int:
    from gmemd.cli.doctor import BAD, PROBE, findings, judge_policy

    found = [*findings(), judge_policy(_rights(connection, options))]
    if connection.for_people:
        rows = [tuple(finding) for finding in found if not finding.item.startswith(PROBE)]
        render.show(render.Table(("ITEM", "FOUND", "VERDICT", "WHAT FOLLOWS"), rows))
    else:
        connection.show([finding._asdict() for finding in found])
    return REFUSED if any(finding.verdict == BAD for finding in found) else DONE


def _rights(connection: Connection, options: Namespace) -> dict[str, Any] | None:
    """What the server says that we may; None: it cannot be asked."""
    if options.timeout is None:
        options.timeout = _PATIENCE
    with contextlib.suppress(OSError, QmpError):
        rights: dict[str, Any] = connection.execute("query-memdev-rights")
        return rights
    return None


@VERBS.add(
    "print a shell's completion script",
    argument("what", metavar="SHELL",
             choices=(*SHELLS, "ids", "commands", "jobs", "events", "types", "owners", "snapshots", "verbs"),
             help="bash, zsh or fish; ids, commands, jobs, events, types, owners, snapshots, verbs: for the script"),
    examples=("completion bash",))
def completion(connection: Connection, options: Namespace) -> int:
    if options.what in SHELLS:
        from gmemd.cli.shell_scripts import script

        print(script(options.what, connection.parser), end="")
        return DONE
    if options.timeout is None:
        options.timeout = _PATIENCE  # not connected yet
    print("".join(f"{name}\n" for name in connection.names(options.what)), end="")
    return DONE


@VERBS.add("list the verbs, or show how one is used",
           argument("about", metavar="VERB", nargs="*", completes="verbs"), examples=("help", "help rm"))
def help_(connection: Connection, options: Namespace) -> int:
    about = " ".join(options.about)
    if not about:
        connection.parser.print_help()
    elif about in connection.verbs:
        verbs_of(connection.parser)[about].print_help()
    elif inner := inner_verbs(about, connection.verbs):
        render.show(render.Table((), [(f"{about} {name}", connection.verbs[f"{about} {name}"].help)
                                      for name in inner]))
    else:
        from gmemd.cli.hints import nearest

        hints = [nearest(about, first_words(connection.verbs)),
                 f"'gmemctl call {about} help' describes a command of the server"]
        raise UsageError("\n  hint: ".join([f"unknown verb '{about}'", *filter(None, hints)]))
    return DONE
