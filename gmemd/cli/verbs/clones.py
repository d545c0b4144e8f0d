"""The verbs about templates: freeze, clone."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from typing import Any

from gmemd.cli.chosen import gather, show_all
from gmemd.cli.connection import DONE, Connection
from gmemd.cli.parser import DRY_RUN, IDS, YES, Verbs, argument, socket_path
from gmemd.cli.verbs.jobs import run_job

VERBS = Verbs()


@VERBS.add(
    "make objects templates: seal their memory against writing, for good", *IDS, YES, DRY_RUN,
    examples=("freeze ram0", "freeze ram0 --dry-run"),
    hints=((r"^object '(.*)' is mapped for writing by ", "'gmemctl clone --copy {} NEW' makes one that is not"),
           (r"^object '(.*)' is frozen: ", "'gmemctl clone --copy {} NEW' makes one that can be written")))
def freeze(connection: Connection, options: Namespace) -> int:
    status, effects = gather(connection, options, lambda name: connection.change("memdev-freeze", {"id": name}),
                             changes="freeze {} for good", among=partial(connection.names, "ids"))
    if connection.dry_run:
        show_all(connection, options, effects)
    return status


@VERBS.add(
    "create objects with the memory of a template, or copies of an object",
    argument("template", metavar="ID", completes="ids", help="the template, or with --copy any object"),
    argument("new", metavar="NEW-ID", nargs="+", help="the ids of the clones"),
    argument("--copy", action="store_true", help="copy the content; nobody may write meanwhile"),
    argument("--qmp", metavar="PATH", type=socket_path, help="with --copy: stop the guest by this socket of its QEMU"),
    DRY_RUN,
    examples=("clone template c1 c2", "clone --copy ram0 spare"),
    hints=((r"^object '(.*)' is not frozen: ", "'gmemctl freeze {}' makes it a template"),
           (r"^object '.*' is a template and mapped by |^object '.*' is the template of ",
            "'gmemctl call query-memdev-clones' shows what uses it")))
def clone(connection: Connection, options: Namespace) -> int:
    effects: list[dict[str, Any]] = []
    for name in options.new:
        arguments: dict[str, Any] = {"template": options.template, "id": name, "copy": options.copy}
        if options.qmp is not None:
            arguments["fence"] = {"via": "qmp", "qmp": options.qmp}
        if options.copy and not connection.dry_run:
            run_job(connection, "memdev-clone", arguments)
        elif effect := connection.change("memdev-clone", arguments):
            effects.append(effect)
    if effects:
        connection.show(effects if len(effects) > 1 else effects[0])
    return DONE
