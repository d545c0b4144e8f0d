"""File descriptors that clients gave to gmemd: by name (getfd) and in sets (add-fd).

An fd that is stored here belongs to the container until it is taken out or closed (qmp.md section 12).
"""

from __future__ import annotations

from typing import Any

from gmemd.errors import QmpError, close_fd


class NamedFds:
    """fds of getfd, by name."""

    def __init__(self) -> None:
        self._fds: dict[str, int] = {}

    def receive(self, name: str, fd: int) -> None:
        """Keep `fd`; one of the same name is replaced. The fd is closed when the name is refused."""
        if name[:1].isascii() and name[:1].isdigit():
            close_fd(fd)
            raise QmpError("Parameter 'fdname' expects a name not starting with a digit")
        old = self._fds.pop(name, None)
        if old is not None:
            close_fd(old)
        self._fds[name] = fd

    def look(self, name: str) -> int:
        """The fd of that name, borrowed."""
        fd = self._fds.get(name)
        if fd is None:
            raise QmpError(f"File descriptor named '{name}' not found")
        return fd

    def give_back(self, name: str, fd: int) -> bool:
        """Keep an fd again that was taken; False, and it stays the caller's, where another has its name now."""
        return self._fds.setdefault(name, fd) == fd

    def take(self, name: str) -> int:
        """Give the fd of that name away."""
        fd = self._fds.pop(name, None)
        if fd is None:
            raise QmpError(f"File descriptor named '{name}' not found")
        return fd

    def close(self) -> None:
        """Close them all."""
        while self._fds:
            close_fd(self._fds.popitem()[1])


class FdSets:
    """fds of add-fd: set id -> fds in the order added, each with its opaque string."""

    def __init__(self) -> None:
        self._sets: dict[int, dict[int, str | None]] = {}

    def receive(self, fd: int, fdset_id: int | None, opaque: str | None) -> dict[str, int]:
        """Keep `fd` in a set, by default that of the lowest free id; the answer of add-fd."""
        if fdset_id is not None and fdset_id < 0:
            close_fd(fd)
            raise QmpError("Parameter 'fdset-id' expects a non-negative value")
        if fdset_id is None:
            fdset_id = next(n for n in range(len(self._sets) + 1) if n not in self._sets)
        self._sets.setdefault(fdset_id, {})[fd] = opaque
        return {"fd": fd, "fdset-id": fdset_id}

    def remove(self, fdset_id: int, fd: int | None) -> None:
        """Close one fd of a set, or all of them."""
        fds = self._sets.get(fdset_id)
        if fds is None or (fd is not None and fd not in fds):
            which = f"fdset-id:{fdset_id}" + ("" if fd is None else f", fd:{fd}")
            raise QmpError(f"File descriptor named '{which}' not found")
        for gone in list(fds) if fd is None else [fd]:
            del fds[gone]
            close_fd(gone)
        if not fds:
            del self._sets[fdset_id]

    def describe(self) -> list[dict[str, Any]]:
        """The answer of query-fdsets: sets by falling id."""
        return [{"fdset-id": number,
                 "fds": [{"fd": fd} if opaque is None else {"fd": fd, "opaque": opaque} for fd, opaque in fds.items()]}
                for number, fds in sorted(self._sets.items(), reverse=True)]

    def close(self) -> None:
        """Close them all."""
        for number in list(self._sets):
            self.remove(number, None)
