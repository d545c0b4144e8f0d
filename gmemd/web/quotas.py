"""What a policy limits, on the status page: the accounts that are nearest to a limit."""

from __future__ import annotations

from html import escape
from typing import Final

from gmemd.authority.ledger import COUNTS, Ledger
from gmemd.web.words import bar, exactly

_SHOWN: Final = 12


def quotas(ledger: Ledger | None) -> str:
    """A bar for each of the fullest; "" without a policy, or limits."""
    return "".join([_meter(*one) for one in ([] if ledger is None else ledger.limited()[:_SHOWN])])


def _meter(account: str, what: str, used: int, limit: int) -> str:
    shown = [f"{amount:,}" if what in COUNTS else exactly(amount) for amount in (used, limit)]
    left = max(0, limit - used)
    return (f'<div class="meter"><h3>{escape(what)} of {escape(account)}</h3>'
            f'{bar([("ours", used), ("rest", left)], max(limit, used, 1), f"{used:,} of {limit:,} {what}")}'
            f'<p class="key"><span><i class="ours"></i>{shown[0]} of {shown[1]}</span></p></div>')
