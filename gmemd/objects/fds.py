"""File descriptors that clients passed to gmemd: by name (getfd), and in sets (add-fd) that all clients share.

A stored fd belongs to the container until it is taken out (qmp.md section 12). Nothing is closed here, because closing
may take long: what is to be closed is given away.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, Final

from gmemd.errors import QmpError
from gmemd.objects.shares import Pool, Share, of_descriptors

if TYPE_CHECKING:
    from gmemd.authority.ledger import Budget

_PART: Final = 8  # an eighth of them for the names of one client, and an eighth for all sets


class NamedFds:
    """The fds of one client's getfd, by name. `share`: what its user has of all such fds."""

    def __init__(self, share: Share | None = None) -> None:
        self._fds: dict[str, int] = {}
        self._share = share or Share(Pool(of_descriptors(_PART)), of_descriptors(_PART))

    def receive(self, name: str, fd: int) -> list[int]:
        """Keep `fd`; the one that it replaces is given away. On QmpError `fd` is still the caller's."""
        if name[:1].isascii() and name[:1].isdigit():
            raise QmpError("Parameter 'fdname' expects a name not starting with a digit")
        if name in self._fds:
            replaced, self._fds[name] = self._fds[name], fd
            return [replaced]
        if len(self._fds) >= of_descriptors(_PART):
            raise QmpError(f"{len(self._fds)} descriptors have names already, the most that one client may keep")
        if not self._share.allows(1):
            raise QmpError(f"{self._share.taken} descriptors of this user's clients have names already, the most that"
                           " it may keep now")
        self._fds[name] = fd
        self._share.take(1)
        return []

    def __contains__(self, name: str) -> bool:
        return name in self._fds

    def look(self, name: str) -> int:
        """The fd with that name, borrowed."""
        fd = self._fds.get(name)
        if fd is None:
            raise QmpError(f"File descriptor named '{name}' not found")
        return fd

    def give_back(self, name: str, fd: int) -> bool:
        """Put back an fd that was taken; False, and it stays the caller's, if another one has its name now."""
        if name in self._fds:
            return self._fds[name] == fd
        self._fds[name] = fd
        self._share.take(1)
        return True

    def take(self, name: str) -> int:
        """Give the fd with that name away."""
        fd = self.look(name)
        del self._fds[name]
        self._share.take(-1)
        return fd

    def take_all(self) -> list[int]:
        """Give them all away."""
        fds = list(self._fds.values())
        self._fds.clear()
        self._share.take(-len(fds))
        return fds


class FdSets:
    """fds of add-fd: set id -> fds in the order added, each with its opaque string.

    As in QEMU an fd is called by its number in this process, but not in a room: how many others there are would show.
    """

    def __init__(self, pool: Pool | None = None, *, room: bool = False) -> None:
        """`pool`: the descriptors in all sets; a room has what is left of them to share."""
        self._sets: dict[int, dict[int, tuple[int, str | None]]] = {}  # the fds by the numbers they are called by
        most = of_descriptors(_PART)
        self.share = Share(pool or Pool(most), None if room else most)
        self._room = room
        self._budgets: dict[int, Budget] = {}  # by fd: to which it is charged

    def receive(self, fd: int, fdset_id: int | None, opaque: str | None,
                budget: Budget | None = None) -> dict[str, int]:
        """Keep `fd` in a set, by default a new one with the lowest free id; the answer of add-fd.

        `budget`: to which it is charged already. On QmpError `fd` is still the caller's.
        """
        if fdset_id is not None and fdset_id < 0:
            raise QmpError("Parameter 'fdset-id' expects a non-negative value")
        if not self.share.allows(1):
            raise QmpError(f"{self.share.taken} descriptors are in sets already, the most that may be kept")
        if fdset_id is None:
            fdset_id = _lowest(self._sets)
        called = _lowest({number for fds in self._sets.values() for number in fds}) if self._room else fd
        self._sets.setdefault(fdset_id, {})[called] = fd, opaque
        self.share.take(1)
        if budget is not None:
            self._budgets[fd] = budget
        return {"fd": called, "fdset-id": fdset_id}

    def remove(self, fdset_id: int, called: int | None) -> list[int]:
        """Give away one fd of a set, or all of them."""
        fds = self._sets.get(fdset_id)
        if fds is None or (called is not None and called not in fds):
            which = f"fdset-id:{fdset_id}" + ("" if called is None else f", fd:{called}")
            raise QmpError(f"File descriptor named '{which}' not found")
        gone = [fds.pop(one)[0] for one in (list(fds) if called is None else [called])]
        for fd in gone:
            if fd in self._budgets:
                self._budgets.pop(fd).account.subtract({"fds-held": 1})
        if not fds:
            del self._sets[fdset_id]
        self.share.take(-len(gone))
        return gone

    def __len__(self) -> int:
        return len(self._sets)

    def describe(self) -> Iterator[dict[str, Any]]:
        """The rows of query-fdsets: sets by descending id."""
        return ({"fdset-id": number,
                 "fds": [{"fd": called} if opaque is None else {"fd": called, "opaque": opaque}
                         for called, (_, opaque) in fds.items()]}
                for number, fds in sorted(self._sets.items(), reverse=True))

    def take_all(self) -> list[int]:
        """Give them all away."""
        return [fd for number in list(self._sets) for fd in self.remove(number, None)]


def _lowest(taken: Collection[int]) -> int:
    """The lowest number that is free."""
    return next(number for number in range(len(taken) + 1) if number not in taken)
