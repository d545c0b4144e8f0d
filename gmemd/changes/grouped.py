"""A change that is made of several commands, which happen all or not at all.

It claims nothing between two of its commands, so a later one may change what an earlier one did; while it waits, what
it has changed is claimed, and ids that it has freed stay taken.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.change import Change
from gmemd.changes.steps import in_order
from gmemd.errors import QmpError
from gmemd.objects.records import updated

if TYPE_CHECKING:
    from collections.abc import Callable

    from gmemd.authority.ledger import Amounts, Budget
    from gmemd.changes.settling import Settler
    from gmemd.changes.steps import Ending, Step
    from gmemd.memory.piece import Piece
    from gmemd.objects.container import Objects
    from gmemd.persist.batch import Operation
    from gmemd.persist.fdstore import Again
    from gmemd.persist.record import Record

_DOING = "a transaction is changing it"


class Grouped(Change):
    """A change of several commands."""

    def __init__(self, settler: Settler, budget: Budget | None = None) -> None:
        super().__init__(settler, budget)
        self._touched: dict[HostMemoryBackend, None] = {}
        self._freed: set[tuple[Objects, str]] = set()  # ids, where they were
        self._bars: list[Callable[[], None]] = []  # each ends one
        self._meanwhile: list[Step] = []  # each gives back what was charged for the time of a command
        self._fresh: dict[Piece, Callable[[], Operation]] = {}  # what it gives to custody, with the note that does

    def judged_alone(self) -> None:
        raise QmpError("this cannot be undone, so it cannot be part of a transaction")

    def charge(self, amounts: Amounts, budget: Budget | None = None, *, meanwhile: bool = False) -> None:
        super().charge(amounts, budget)
        if meanwhile and (budget or self.budget) is not None:
            self._meanwhile.append(self._undo[-1])

    # -- acting ----------------------------------------------------------------------------------

    def keep(self, piece: Piece, *, again: Again | None = None) -> None:
        super().keep(piece, again=again)
        self._touch(piece)
        if self._notes and piece.record is not None:
            self._fresh[piece] = self._notes[-1]

    def rewrite(self, backend: HostMemoryBackend) -> None:
        self._touch(backend)
        if backend in self._fresh:  # its record is written when it is given to custody
            self._record(backend, updated(backend))
        else:
            super().rewrite(backend)

    def forget(self, piece: Piece) -> None:
        note = self._fresh.pop(piece, None)
        if note is None:
            super().forget(piece)
        else:
            self._notes = tuple(one for one in self._notes if one is not note)
            self._record(piece, None)

    def drop(self, record: Record) -> None:
        custody = self._settler.custody
        assert custody.keeps
        custody.check_writable()
        self._note(partial(custody.remove, record, grouped=True))

    def _touch(self, piece: Piece) -> None:
        if isinstance(piece, HostMemoryBackend):
            self._touched[piece] = None

    def freed(self, objects: Objects, object_id: str) -> None:
        """A command has freed an id."""
        self._freed.add((objects, object_id))

    def hold(self) -> None:
        """Keep others from changing what it has changed; until the next `unclaim_own`."""
        for backend in self._touched:
            if backend.home is not None and backend.home.get(backend.id) is backend and not backend.busy:
                self.claim(backend, _DOING, away=True)
        for objects, object_id in self._freed:
            if not objects.is_taken(object_id):
                objects.bar(object_id, f"object '{object_id}' is being deleted by a transaction")
                self._bars.append(partial(objects.unbar, object_id))

    def unclaim_own(self) -> None:
        """A command is done: the next one may change the same."""
        self._unbar()
        for backend, _ in self._claimed:
            self.release(backend)
        in_order(self._meanwhile)
        ended = {id(arguments) for _, arguments in self._meanwhile}  # a compiled step itself is no object that stays
        self._undo = tuple(step for step in self._undo if id(step[1]) not in ended)
        self._meanwhile.clear()

    # -- ending ----------------------------------------------------------------------------------

    def conclude(self, value: Any) -> Any:
        """As of any change; nothing more is added to it, so it goes on as a plain one."""
        result = super().conclude(value)
        return self.hand_over() if result is self else result

    def revert(self) -> Ending:
        self._unbar()
        return super().revert()

    def _unbar(self) -> None:
        while self._bars:
            self._bars.pop()()

    def _give(self) -> None:
        super()._give()
        if len(self.operations) > 1:
            for operation in self.operations:
                operation.grouped = True
