"""What each account has of what is limited, and what one client may have of it.

An account is a user's, everybody's of a rule with `share = "rule"`, a made room's, or a namespace's, in which its rooms
count as well (`Account.above`). Whatever makes something reserves it as soon as
it is judged, and undoing that gives it back; so what is not undone is charged, without a second step, and nothing is
ever above a limit, however many requests are under way. What is deleted is charged until its deletion is durable.

    bytes, hugepages-2M, ...   by piece of memory: once for a template and its clones
    objects, jobs              by piece
    clients, queued, fds-held, fds-in-flight, snapshot-bytes
                               not noted down but asked of the connections and directories of an account (`Source`),
                               besides what is reserved for work in progress
    resident                   measured, when gmemd is to populate memory (commands/charging.py); here is what it is
                               populating now

After a restart the accounts are filled again from what came back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from types import MappingProxyType
from typing import Any, Final, NamedTuple, Protocol
from weakref import WeakSet

from gmemd.errors import QmpError

COUNTED: Final = ("bytes", "resident", "objects", "fds-held", "fds-in-flight", "clients", "queued", "jobs",
                  "snapshot-bytes")  # and hugepages-SIZE
COUNTS: Final = frozenset(("objects", "fds-held", "fds-in-flight", "clients", "jobs"))  # the others are bytes
_ONE: Final = {"objects": 1}
_ASKED: Final = frozenset(("fds-held", "fds-in-flight", "clients", "queued", "snapshot-bytes"))

Amounts = Mapping[str, int]
NOTHING: Final[Amounts] = MappingProxyType(dict.fromkeys(("bytes", "resident", "objects", "jobs", "clients"), 0))
NO_LIMITS: Final[Amounts] = MappingProxyType({})


class Source(Protocol):
    """Something that has some of what an account is asked for: a connection, a directory of snapshots."""

    def holds(self, what: str) -> int:
        """How much it has now."""
        ...


class Account:
    """What one user, everybody of a rule, a made room or a namespace has."""

    above: Account | None = None  # in which all of it counts, too

    def __init__(self, name: str, limits: Amounts = NO_LIMITS) -> None:
        self.name = name  # "uid:UID", "rule:NAME", "room:ROOM" or "namespace:NAME"
        uid = name.removeprefix("uid:")
        self.uid = int(uid) if uid.isdecimal() else -1  # whose it is; -1: not one user's
        self.limits = limits  # of the latest client: two rules may give one user different ones
        self.sources: WeakSet[Source] = WeakSet()
        self.objects: dict[Charge, Any] = {}  # what is charged here, and the object
        self.charged: dict[str, int] = {}  # and reserved

    def used(self, what: str) -> int:
        """How much it has of something, with what is reserved."""
        used = self.charged.get(what, 0)
        return used + sum([source.holds(what) for source in self.sources]) if what in _ASKED else used

    def add(self, amounts: Amounts) -> None:
        """Charge, whatever the limits are."""
        charged = self.charged
        for what, amount in amounts.items():
            charged[what] = charged.get(what, 0) + amount
        if self.above is not None:
            self.above.add(amounts)

    def subtract(self, amounts: Amounts) -> None:
        """Give back."""
        charged = self.charged
        for what, amount in amounts.items():
            left = charged[what] - amount
            assert left >= 0, f"{self.name} would have {left} of {what}"
            charged[what] = left
        if self.above is not None:
            self.above.subtract(amounts)

    def note(self, charge: Charge, backend: Any) -> None:
        """An object is charged here."""
        self.objects[charge] = backend
        if self.above is not None:
            self.above.note(charge, backend)

    def forget(self, charge: Charge) -> None:
        """It no longer is."""
        del self.objects[charge]
        if self.above is not None:
            self.above.forget(charge)

    def belong(self, above: Account | None) -> None:
        """Have all of it count in another account, and no longer in the one before."""
        if above is not self.above:
            if self.above is not None:
                self.above.subtract(self.charged)
                for charge in self.objects:
                    self.above.forget(charge)
            self.above = above
            if above is not None:
                above.add(self.charged)
                for charge, backend in self.objects.items():
                    above.note(charge, backend)

    def describe(self) -> dict[str, int]:
        """How much it has of each thing that can be limited; of huge pages, if it has or may have any."""
        others = sorted({what for what, charged in self.charged.items() if charged} | {*self.limits})
        return {what: self.used(what) for what in dict.fromkeys((*COUNTED, *others)) if what != "resident"}


class Budget(NamedTuple):
    """An account, and the limits that the rule of one client sets it."""

    account: Account
    limits: Amounts

    @property
    def levels(self) -> Iterator[Budget]:
        """Itself, and what the accounts above may have."""
        yield self
        above = self.account.above
        if above is not None:
            yield from Budget(above, above.limits).levels

    def check(self, amounts: Amounts) -> None:
        """Raise QmpError if that much more would be above a limit."""
        account, limits = self
        while True:
            if limits:
                for what, amount in amounts.items():
                    limit = limits.get(what)
                    if limit is not None and amount:
                        used = account.used(what) if what in _ASKED else account.charged.get(what, 0)
                        if used + amount > limit:
                            refuse_above(what, limit, used, amount)
            above = account.above
            if above is None:
                return
            account, limits = above, above.limits

    def reserve(self, amounts: Amounts) -> None:
        """Charge it, or raise QmpError."""
        if self.limits or self.account.above is not None:
            self.check(amounts)
        self.account.add(amounts)

    def charge(self, backend: Any, memory: Amounts, besides: Amounts, like: Charge | None = None) -> Charge:
        """Charge a new object of so much memory, or of the same as another of the account has, and more that is its
        own; QmpError."""
        if like is not None:
            shared, new = like.memory, besides
        else:
            shared, new = Memory(self.account, memory), total(memory, besides) if besides else memory
        counted = {**_ONE, **new}
        if self.limits or self.account.above is not None:
            self.check(counted)
        return Charge(shared, backend, besides, counted)


def total(first: Amounts, second: Amounts, sign: int = 1) -> dict[str, int]:
    """The sum of amounts, or with `sign` -1 the difference, without what is 0."""
    found = {what: first.get(what, 0) + sign * second.get(what, 0) for what in {*first, *second}}
    return {what: amount for what, amount in found.items() if amount}


def refuse_above(what: str, limit: int, used: int, asked: int) -> None:
    """Raise QmpError if `asked` more of something would be above its limit."""
    if used + asked > limit:
        raise QmpError(f"the quota of '{what}' is {limit}: {used} are used, and {asked} more were asked for")


class Memory:
    """A piece of memory, charged once to an account, however many of its objects have it."""

    def __init__(self, account: Account, amounts: Amounts) -> None:
        self.account = account
        self.amounts = amounts
        self.objects = 0  # that have it: the first is charged, too, and the last gives it back


class Charge:
    """What one object is charged: its memory, which others may have too, and `besides` what is its own."""

    def __init__(self, memory: Memory, backend: Any, besides: Amounts, counted: Amounts | None = None) -> None:
        """counted: what all of it is, if that is known."""
        self.account = memory.account
        self.memory = memory
        self._besides = besides
        self._counted = counted if memory.objects == 0 else None  # as long as it is right; None: to be worked out
        self.account.note(self, backend)
        self.account.add(counted or self._alone())
        memory.objects += 1

    def _alone(self) -> Amounts:
        """What it counts, itself among it, that no other object does."""
        if self.memory.objects:
            return {**_ONE, **self._besides}
        return {**_ONE, **(total(self.memory.amounts, self._besides) if self._besides else self.memory.amounts)}

    @property
    def amounts(self) -> dict[str, int]:
        """What its memory and the rest count, as if it were alone."""
        return total(self.memory.amounts, self._besides)

    def grow(self, more: Amounts) -> None:
        """It has more of its own now, or less if negative."""
        self.account.add(more)
        self._besides, self._counted = total(self._besides, more), None

    def release(self) -> None:
        """The object is gone, or will not exist."""
        self.account.forget(self)
        self.memory.objects -= 1
        self.account.subtract(self._counted if self._counted and not self.memory.objects else self._alone())


class Trial(Account):
    """A copy of an account to try changes on, one after another: what they charge and give back at once stays charged
    if they are kept."""

    def __init__(self, real: Account) -> None:
        super().__init__(real.name, real.limits)
        self.sources, self.charged = real.sources, dict(real.charged)
        self._given_back: list[Amounts] = []
        memories: dict[Memory, Memory] = {}
        for charge, backend in real.objects.items():
            own = copy(charge)
            own.account, own.memory = self, memories.setdefault(charge.memory, copy(charge.memory))
            own.memory.account = self
            self.objects[own] = backend

    def subtract(self, amounts: Amounts) -> None:
        self._given_back.append(amounts)
        if self.above is not None:
            self.above.subtract(amounts)

    def settle(self, *, kept: bool) -> None:
        """A change was tried."""
        for amounts in self._given_back if not kept else ():
            for what, amount in amounts.items():
                self.charged[what] -= amount
        self._given_back.clear()


class Trials:
    """The copies of all accounts that changes are tried on."""

    def __init__(self) -> None:
        self._copies: dict[Account, Trial] = {}

    def of(self, real: Account) -> Trial:
        """The copy of an account."""
        found = self._copies.get(real)
        if found is None:
            found = self._copies[real] = Trial(real)
            found.above = None if real.above is None else self.of(real.above)
        return found

    def settle(self, *, kept: bool) -> None:
        """A change was tried."""
        for trial in self._copies.values():
            trial.settle(kept=kept)


class Ledger:
    """All accounts."""

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}

    def __iter__(self) -> Iterator[Account]:
        """The accounts by name."""
        return iter(sorted(self._accounts.values(), key=lambda account: account.name))

    def account(self, name: str) -> Account:
        """The account with that name, which is created if needed."""
        return self._accounts.setdefault(name, Account(name))

    def limited(self) -> list[tuple[str, str, int, int]]:
        """Account, what, used and limit of what is limited and not only measured, the fullest first."""
        found = [(account.name, what, account.used(what), limit) for account in self
                 for what, limit in account.limits.items() if what != "resident"]
        return sorted(found, key=lambda one: one[2] / (one[3] or 1), reverse=True)

    def budget(self, name: str, limits: Amounts) -> Budget:
        """The budget of a client whose rule sets these limits."""
        account = self.account(name)
        account.limits = limits
        return Budget(account, limits)
