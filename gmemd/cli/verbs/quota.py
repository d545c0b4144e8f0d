"""The verb about what a policy limits: quota."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from gmemd.authority.ledger import COUNTS
from gmemd.cli import render
from gmemd.cli.connection import DONE, Connection
from gmemd.cli.parser import Verbs

VERBS = Verbs()


@VERBS.add("show what the accounts have, and may have",
           examples=("quota",),
           hints=((r"^the quota of '", "'gmemctl quota' shows what you have; deleting objects and dismissing jobs "
                                       "gives it back"),))
def quota(connection: Connection, options: Namespace) -> int:
    found = connection.execute("query-memdev-quota")
    if not connection.for_people:
        connection.show(found)
    elif not found:
        print("nobody is limited: there is no policy")
    else:
        rows = [(account.get("account", "yours"), item["what"], shown(item["what"], item["used"]),
                 shown(item["what"], item["limit"]) if "limit" in item else "", _share(item))
                for account in found for item in account["items"] if item["used"] or "limit" in item]
        render.show(render.Table(("ACCOUNT", "WHAT", "USED", "LIMIT", ""), rows, ("USED", "LIMIT", "")))
    return DONE


def shown(what: str, amount: int) -> str:
    """An amount of something that is limited, for people."""
    return str(amount) if what in COUNTS else render.size(amount)


def _share(item: dict[str, Any]) -> str:
    return f"{100 * item['used'] // item['limit']}%" if item.get("limit") else ""
