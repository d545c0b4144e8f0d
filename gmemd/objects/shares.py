"""How users share what gmemd has only so much of: each may have as much as is left.

So the first one gets a half at most, the next one a quarter, and there is always something for one more. A policy may
set a user's limit instead.
"""

from __future__ import annotations

import resource
from typing import Final

_FEWEST: Final = 16  # of any thing


def of_descriptors(part: int) -> int:
    """A half (2), an eighth (8), ... of the descriptors that this process may have; at least 16."""
    try:
        return max(_FEWEST, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // part)
    except OSError:
        return _FEWEST


class Pool:
    """What there is of one thing, for all users together."""

    def __init__(self, size: int, least: int = _FEWEST) -> None:
        """`least`: what a user may have in any case, however little is left."""
        self.size = size
        self.least = least
        self.taken = 0


class Share:
    """What one user has of it."""

    def __init__(self, pool: Pool, limit: int | None = None) -> None:
        self.pool = pool
        self.limit = limit  # set by a policy
        self.taken = 0

    @property
    def most(self) -> int:
        """How much the user may have now."""
        return max(self.pool.least, self.pool.size - self.pool.taken) if self.limit is None else self.limit

    def allows(self, more: int) -> bool:
        """Whether the user may take that much more."""
        return self.taken + more <= self.most

    def take(self, amount: int) -> None:
        """Count what the user has taken, or, less than 0, given back."""
        self.taken += amount
        self.pool.taken += amount
