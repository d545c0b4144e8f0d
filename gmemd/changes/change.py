"""A change: given to every command that does more than read.

Each step of the command registers how it is undone and what finishes it, claims what it works on, and says what custody
is to keep. Whatever ends the command early (a refusal, an exception, a failed flush, a dry run) undoes the steps in
reverse, once; otherwise the change is finished when custody has made it durable.

    change.claim(backend, "it is being wiped")    # refused at once if another change has it
    change.undo(...)                              # how to undo what comes next
    change.charge({"jobs": 1})                    # refused if that is above the client's quota
    change.keep(backend)                          # no effect if objects are not kept
    change.done(...)                              # when it is durable

Everything happens in the order of the calls. A long command returns a coroutine, which begins when what others changed
before is durable, and may settle what it has done so far before it goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final

from gmemd.changes.notes import Notes
from gmemd.changes.settling import Settler
from gmemd.changes.steps import Ending, Step, after, in_order
from gmemd.changes.threads import close_beside
from gmemd.changes.waiting import after_ending, carry, raise_after, reply
from gmemd.errors import QmpError

if TYPE_CHECKING:
    from gmemd.authority.ledger import Amounts, Budget
    from gmemd.backends.base import HostMemoryBackend

_UNTOLD: Final = "be run: its arguments fit"
PARTS: Final = ("_claimed", "_done", "_notes", "_reserved", "_undo", "budget", "dry_run", "ending", "error",
                "operations", "pending", "value")


class WithFds:
    """A reply with file descriptors; they belong to it and are closed once it is sent."""

    __slots__ = ("fds", "value")

    def __init__(self, value: Any, fds: list[int]) -> None:
        self.value = value
        self.fds = fds


class Judged(Exception):
    """A dry run has reached the point where the command would act."""

    def __init__(self, effect: Any, *, whole: bool, then: Callable[[], object] | None = None) -> None:
        self.effect = effect  # the sentence after "would", or a coroutine that returns it
        self.whole = whole  # all checks were made
        self.then = then  # makes a trial's objects look as if it had acted


class Change(Notes):
    """One change. As a command's result: its `value` is acknowledged once it is durable (`settled`)."""

    # Defaults of what few changes need are on the class, from where reading takes longer.
    value: Any = None
    error: QmpError | None = None  # why it could not be made durable, and was undone
    ending: Ending = None  # what the last step still waits for

    def __init__(self, settler: Settler, budget: Budget | None = None) -> None:
        self._settler = settler
        self.budget = budget  # what the client may have; None: it is not limited
        self.dry_run = False  # it only finds out what it would do
        self.pending = False
        self._claimed: tuple[tuple[HostMemoryBackend, str], ...] = ()
        self._undo: tuple[Step, ...] = ()
        self._done: tuple[Step, ...] = ()
        self._notes = ()
        self._reserved = 0

    # -- deciding --------------------------------------------------------------------------------

    def judged(self, effect: str | Coroutine[Any, Any, str] | None = None, *, whole: bool = True,
               then: Callable[[], object] | None = None) -> None:
        """All checks are done: a dry run ends here.

        effect: the result of the dry run, made only for one: the sentence after "would", or a coroutine. then: makes
        the objects look as if it had acted, without a system call; for the next action of a trial.
        """
        if self.dry_run:
            raise Judged(_UNTOLD, whole=False) if effect is None else Judged(effect, whole=whole, then=then)

    def judged_alone(self) -> None:
        """The same, for what cannot be undone, and so is not for a transaction."""
        self.judged()

    def claim(self, backend: HostMemoryBackend, doing: str, *, shared: bool = False, away: bool = False) -> None:
        """Keep others from changing an object until this change has ended; QmpError says what has claimed it.

        shared: others may share the claim, for work that only reads. away: even if another gmemd may own it.
        """
        backend.claim(doing, shared=shared, away=away)
        self._claimed += ((backend, doing),)
        self.pending = True

    def claims_any(self) -> bool:
        """Whether it has claimed anything."""
        return bool(self._claimed)

    def check_live(self) -> None:
        """Raise QmpError if what it has claimed no longer exists: another change could not be made durable."""
        for backend, _ in self._claimed:
            self._settler.check_live(backend)

    def release(self, backend: HostMemoryBackend) -> None:
        """End the claim on an object early."""
        for _, doing in [claim for claim in self._claimed if claim[0] is backend]:
            close_beside(backend.unclaim(doing))
        self._claimed = tuple(claim for claim in self._claimed if claim[0] is not backend)

    def check_quota(self, amounts: Amounts) -> None:
        """Raise QmpError if that much more would be above a limit of the client's."""
        if self.budget is not None:
            self.budget.check(amounts)

    def charge(self, amounts: Amounts, budget: Budget | None = None, *, meanwhile: bool = False) -> None:
        """Charge the client, or this budget, or raise QmpError; meanwhile: until this change has ended."""
        budget = budget or self.budget
        if budget is not None:
            budget.reserve(amounts)
            self.undo(budget.account.subtract, amounts)
            if meanwhile:
                self.done(budget.account.subtract, amounts)

    # -- acting ----------------------------------------------------------------------------------

    def done(self, function: Callable[..., object], *arguments: object) -> None:
        """Register what to do once everything is durable."""
        self._done += ((function, arguments),)
        self.pending = True

    # -- ending ----------------------------------------------------------------------------------

    def conclude(self, value: Any) -> Any:
        """The command's result from its function's: `value`, this change, or a coroutine."""
        if type(value) is not dict and isinstance(value, Coroutine):  # mostly a dict, and that test is faster
            return carry(self, self._settler, value)
        assert not self._claimed, "the claim would end before the change is durable"
        if self._notes:
            self._give()
            if type(value) is WithFds:
                return reply(value, self.settled(), value.fds)
            self.value = value
            return self
        if self._reserved:
            self._give_back()
        ending = in_order(self._done)
        return value if ending is None else after_ending(ending, value)

    def refuse(self, error: BaseException) -> Coroutine[Any, Any, None]:
        """Undo everything after an error: raise it, now or, if undoing takes long, from the returned coroutine."""
        ending = self.revert()
        self.unclaim()
        if ending is None:
            raise error
        return raise_after(ending, error)

    def settle(self) -> Awaitable[None]:
        """Make everything so far durable, after which it is no longer undone; QmpError if that failed."""
        self._give()
        return self.settled()

    def settled(self) -> asyncio.Future[None]:
        """A future, to be awaited, for what was noted, which goes with the next flush.

        Ends with QmpError when the flush has failed and everything is undone.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def tell() -> None:
            self.operations = ()
            if not done.done():
                done.set_result(None) if self.error is None else done.set_exception(self.error)

        if self.operations:
            self._settler.settle([self], tell)
        else:
            after([self.finish()], tell)
        return done

    def hand_over(self) -> Change:
        """Move everything to a new change, for work that goes on after the reply; this one is then empty."""
        other = Change(self._settler)
        for name in PARTS:
            own = getattr(self, name)
            setattr(self, name, getattr(other, name))
            setattr(other, name, own)
        return other

    def finish(self) -> Ending:
        """Everything is durable: take the final steps; it is no longer undone."""
        steps, self._done, self._undo = self._done, (), ()
        if self._reserved:
            self._give_back()
        return in_order(steps) if steps else None

    def revert(self) -> Ending:
        """Undo everything, the last step first."""
        steps, self._done, self._undo, self._notes = self._undo[::-1], (), (), ()
        self._give_back()
        return in_order(steps)

    def unclaim(self) -> None:
        """End all claims."""
        claimed, self._claimed = self._claimed, ()
        for backend, doing in claimed:
            close_beside(backend.unclaim(doing))


def changing(settler: Settler, function: Callable[..., Any], kind: type[Change] = Change) -> Callable[..., Any]:
    """Wrap a command that takes a change as its last argument; the result is that of Change.conclude."""
    def run(gmemd: Any, caller: Any, arguments: dict[str, Any]) -> Any:
        change = kind(settler, None if caller is None else caller.budget)
        try:
            value = function(gmemd, caller, arguments, change)
            return value if type(value) is dict and not change.pending else change.conclude(value)
        except BaseException as exc:
            return change.refuse(exc)

    return run
