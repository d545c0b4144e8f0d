"""Who owns an object that is being moved from one gmemd, the source, to another, the destination.

Each side's state is in the record of the object, so it is durable, and outlives the daemon; the token is that of one
attempt, and never used again. Only an owner hands the memory out, and lets anybody write it.

    source       owns   what it means
    (nothing)    yes    nothing was tried
    offered      yes    an attempt is under way, or was when the daemon ended
    kept         yes    the attempt has failed, for good: it never becomes `moved` any more
    moved        no     given up; the memory is still there until the destination is known to own it
    gone         no     the destination owns it: only this tombstone is left, and keeps the id from being used

    destination  owns   what it means
    (nothing)    no     receiving; if the daemon ends, nothing is left of it
    prepared     no     all of it is here, compared and durable, for when the source has given it up
    owned        yes    the source has given it up

What one side does, the other one has made possible, and durable, before:

    offered -> moved     the destination has said DURA: it is `prepared`, and only the source's word changes that
    prepared -> owned    the source has said YOUR: it is `moved`
    moved -> gone        the destination has said DONE: it is `owned`
    offered -> kept      at any time before `moved`: the source decides alone
    prepared -> nothing  the source has said KEEP: it is `kept`

So at most one side owns. Where neither does, the source is `moved` and the destination `prepared`, all of the memory is
there, durable, and each side's next answer makes the destination the owner.

Whichever side or line dies in between: a source that is `offered` without an attempt under way, or `kept`, owns the
object, and needs nobody. One that is `moved`, and a destination that is `prepared`, wait for an answer: any later line
between the two gives it (`answered`), as often as it takes. A side that knows nothing of the token says so, and that
changes nothing: then only a person can say who owns (memdev-move-resolve with `force`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from gmemd.errors import QmpError

AWAY: Final = frozenset(("moved", "prepared"))  # states in which the memory is here, and not owned
OF_THE_SOURCE: Final = frozenset(("offered", "kept", "moved", "gone"))
_REMEMBERED: Final = 16  # attempts
DROPPED: Final = "dropped"  # of a destination that had prepared, and has nothing any more
UNKNOWN: Final = "unknown"


class Move(NamedTuple):
    """What the record of an object says about its latest move."""

    token: str
    state: str
    peer: str  # the other side, in the words of who has asked for the move
    generation: int  # that the object has, or will have, at the destination
    failed: Sequence[str] = ()  # tokens of the attempts before it, whose destinations may still ask

    def dump(self) -> dict[str, Any]:
        """It as JSON."""
        return self._asdict()

    def knows(self, token: object) -> str | None:
        """The state of an attempt here; None: it is not known."""
        return self.state if token == self.token else "kept" if token in self.failed else None

    def after(self) -> Sequence[str]:
        """What is `failed` for the next attempt."""
        if self.state not in ("offered", "kept"):
            return ()
        return (*self.failed, self.token)[-_REMEMBERED:]

    def now(self, state: str) -> Move:
        """The same move in another state."""
        return self._replace(state=state)


def answered(asked: str, known: str | None) -> tuple[str, str | None]:
    """What a side says that is asked about a token, and the state that it must durably have before it says so.

    asked: the state of the side that asks; a source has become `kept` before, if it was `offered`. known: the state
    here; None: the token is not known.
    """
    if asked == "prepared":
        if known in ("offered", "kept"):
            return "kept", "kept"
        if known in ("moved", "gone"):
            return "moved", known
    elif known == "owned":
        return "owned", known
    elif known == "prepared" and asked == "moved":
        return "owned", "owned"
    elif known == "prepared" and asked == "kept":
        return DROPPED, DROPPED
    return UNKNOWN, known


def concluded(state: str, answer: str) -> str:
    """The state of the side that has asked, now that it knows the answer; QmpError where it does not help."""
    after = {("prepared", "moved"): "owned", ("prepared", "kept"): DROPPED, ("moved", "owned"): "gone",
             ("kept", DROPPED): "kept", ("kept", UNKNOWN): "kept"}.get((state, answer))
    if after is not None:
        return after
    if answer == UNKNOWN:
        raise QmpError("the other side knows nothing of this move: if it is the right one, 'force' says who owns it")
    raise QmpError(f"the other side says '{answer}', and here it is '{state}'")
