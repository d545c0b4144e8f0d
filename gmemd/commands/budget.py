"""What a client may have."""

from __future__ import annotations

from gmemd.authority.ledger import Amounts, Budget, Source
from gmemd.commands.context import Gmemd


def budget_of(gmemd: Gmemd, account: str, limits: Amounts, user: Source) -> Budget | None:
    """What a client may have whose rights name this account; `user`: the connections of its user."""
    if gmemd.account is not None:
        budget = Budget(gmemd.account, gmemd.account.limits)
    elif gmemd.ledger is not None:
        budget = gmemd.ledger.budget(account, limits)
    else:
        return None
    *_, top = budget.levels
    top.account.sources |= {user, gmemd.snapshots}
    return budget
