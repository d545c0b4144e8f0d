"""The command that shows what the accounts have, and may have."""

from __future__ import annotations

from typing import Any

from gmemd.authority.ledger import Account
from gmemd.commands.charging import resident
from gmemd.commands.context import Caller, Gmemd


def query_memdev_quota(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
    if caller.rights.sees_all:
        rooms = [room.account for room in gmemd.rooms.values() if room.account is not None]
        return _describe(gmemd, [*(gmemd.ledger or ()), *rooms], named=True)
    return _describe(gmemd, [] if caller.budget is None else [caller.budget.account], named=False)


async def _describe(gmemd: Gmemd, accounts: list[Account], *, named: bool) -> list[dict[str, Any]]:
    return [{**({"account": account.name} if named else {}), "items": await _items(gmemd, account)}
            for account in accounts]


async def _items(gmemd: Gmemd, account: Account) -> list[dict[str, Any]]:
    in_memory = await resident(gmemd, account)
    used = {"resident": in_memory, **account.describe()}
    return [{"what": what, "used": amount, **({"limit": account.limits[what]} if what in account.limits else {})}
            for what, amount in used.items()]
