"""The command that carries out several others: all of them, or none."""

from __future__ import annotations

from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

from gmemd.authority.ledger import Budget, Trials
from gmemd.changes.change import Judged
from gmemd.changes.grouped import Grouped
from gmemd.commands.context import Caller, Function, Gmemd
from gmemd.commands.effect import found, judge
from gmemd.commands.planning import planned, quota_planned, trial_of
from gmemd.commands.rooms import in_its_room, said_outside
from gmemd.errors import QmpError
from gmemd.schema.validate import Command

_ALONE: Final = ("job-id", "device-state", "zero")  # arguments that begin something that cannot be undone


class _Action(NamedTuple):
    """One action, whose arguments are complete."""

    place: int
    name: str
    function: Function
    room: Gmemd  # where it is looked for; once it is placed, that of what it names
    arguments: dict[str, Any]  # as they are said there

    def placed(self) -> _Action:
        """The action in the room of what it names; those before it may have made that."""
        room, own = in_its_room(self.room, self.arguments)
        return self._replace(room=room, arguments=own)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Say in an error which action it is of."""
        try:
            with said_outside(self.room, self.arguments):
                yield
        except QmpError as exc:
            raise QmpError(f"actions[{self.place}] ({self.name}): {exc.desc}", exc.error_class) from exc

    @property
    def object_id(self) -> str:
        """The id that it may free."""
        found: str = self.arguments.get("id", "")
        return found


def carry_out(commands: Mapping[str, tuple[Command, Function]], gmemd: Gmemd, caller: Caller,
              arguments: dict[str, Any], change: Grouped) -> Any:
    """The result of memdev-transaction."""
    dry_run = arguments["dry-run"] or change.dry_run
    trials = Trials()
    seen = trial_of(gmemd, trials) if dry_run else gmemd
    actions = [_checked(commands, seen, caller, index, action) for index, action in enumerate(arguments["actions"])]
    if dry_run:
        return _plan(gmemd, seen, caller, actions, change, trials)
    done: list[dict[str, Any]] = []
    for unplaced in actions:
        action = unplaced.placed()
        with action.told():
            result = _begun(caller, action, change)
        if isinstance(result, Coroutine):
            change.undo(result.close)
            change.hold()
            return _go_on(gmemd, caller, actions, result, done, change)
        done.append({"type": action.name, "return": result})
    return {"actions": done}


def _checked(commands: Mapping[str, tuple[Command, Function]], gmemd: Gmemd, caller: Caller, index: int,
             action: dict[str, Any]) -> _Action:
    name, given = action["type"], action.get("data", {})
    unchecked = _Action(index, name, _never, gmemd, {})
    with unchecked.told():
        if type(given) is not dict:
            raise QmpError("Invalid parameter type for 'data', expected: object")
        _, function, complete = found(commands, caller, name, given)
        for refused in _ALONE:
            if complete.get(refused):
                raise QmpError(f"parameter '{refused}' is not for a transaction")
    return unchecked._replace(function=function, arguments=complete)


def _never(*_: Any) -> Any:
    raise AssertionError("an action that was not checked")


def _begun(caller: Caller, action: _Action, change: Grouped) -> Any:
    """Carry out an action, as far as it does not wait: its result, or a coroutine."""
    taken = action.room.objects.is_taken(action.object_id)
    result = action.function(action.room, caller, action.arguments, change)
    if not isinstance(result, Coroutine):
        _ended(action, change, taken=taken)
    return result


def _ended(action: _Action, change: Grouped, *, taken: bool) -> None:
    if taken and not action.room.objects.is_taken(action.object_id):
        change.freed(action.room.objects, action.object_id)
    change.unclaim_own()


async def _go_on(gmemd: Gmemd, caller: Caller, actions: Sequence[_Action], begun: Any, done: list[dict[str, Any]],
                 change: Grouped) -> dict[str, Any]:
    """The rest, from an action on that waits: `begun` is its coroutine."""
    for unplaced in actions[len(done):]:
        action = unplaced.placed()
        with action.told():
            result = begun or _begun(caller, action, change)
            begun = None
            if isinstance(result, Coroutine):
                change.undo(result.close)
                result = await _waited(gmemd, action, result, change)
        done.append({"type": action.name, "return": result})
    return {"actions": done}


async def _waited(gmemd: Gmemd, action: _Action, work: Any, change: Grouped) -> Any:
    """Wait for an action that has begun; meanwhile nobody else changes what the transaction has changed."""
    change.hold()
    await gmemd.settler.durable()
    change.check_live()
    result = await work
    _ended(action, change, taken=True)
    return result


# -- a dry run ---------------------------------------------------------------------------------------

async def _plan(gmemd: Gmemd, trial: Gmemd, caller: Caller, actions: Sequence[_Action], change: Grouped,
                trials: Trials) -> dict[str, Any]:
    """Judge each action on a copy of the objects on which those before it seem to have acted."""
    rows: list[dict[str, Any]] = []
    budget = None if caller.budget is None else caller.budget._replace(account=trials.of(caller.budget.account))
    for unplaced in actions:
        action = unplaced.placed()
        try:
            with action.told():
                judged, effect = await _judge(caller, action, budget, trials)
        except QmpError as exc:
            if change.dry_run:  # of query-command-effect
                raise
            rows.append({"type": action.name, "refused": {"class": exc.error_class, "desc": exc.desc}})
            continue
        rows.append({"type": action.name, "effect": f"would {effect}", "complete": judged.whole})
    change.judged(f"carry out {len(actions)} actions, or none", whole=all([row["complete"] for row in rows
                                                                         if "complete" in row]))
    return {"actions": rows, **await planned(gmemd, trial), **quota_planned(caller.budget, budget)}


async def _judge(caller: Caller, action: _Action, budget: Budget | None, trials: Trials) -> tuple[Judged, str]:
    change = Grouped(action.room.settler)
    change.budget, kept = budget, False
    try:
        judged, effect = await judge(action.function, action.room, caller, action.arguments, change)
        kept = True
    finally:
        trials.settle(kept=kept)
    if judged.then is not None:
        judged.then()
    return judged, effect
