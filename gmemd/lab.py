"""The fault lab: makes the n-th creation, population, conversion, hand-out or store fail or take longer.

Nothing else in gmemd knows of it. It sits at the daemon's borders: LabKernel in front of the Kernel, LabNotifier in
front of the service manager. Which operation is hit depends only on their number: neither time nor chance is involved.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from gmemd.kernel.kernel import Kernel, PageInUse
from gmemd.kernel.populate import without
from gmemd.kernel.rules import PAGE_SIZE, refuse

if TYPE_CHECKING:
    from gmemd.persist.notify import Notifier

HALFWAY: Final = ("populate", "convert")  # operations that can fail at an offset
_FULL: Final = (1 << 64) - 2  # the maximum of an eventfd; writing to it would then block


@dataclass
class Injection:
    """One fault that waits for its turn."""

    number: int
    operation: str
    nth: int  # the n-th operation from now on, or every n-th
    code: int | None  # errno; None: it succeeds
    seconds: float  # how much longer it takes
    offset: int | None  # bytes; where it fails
    repeat: bool
    seen: int = 0
    struck: int = 0


class Lab:
    """The active injections. Operations may come from any thread."""

    def __init__(self) -> None:
        self._injections: dict[int, Injection] = {}
        self._numbers = 0
        self._lock = threading.Lock()

    def inject(self, operation: str, *, nth: int = 1, code: int | None = None, seconds: float = 0,
               offset: int | None = None, repeat: bool = False) -> int:
        """Add a fault; its number."""
        with self._lock:
            self._numbers += 1
            self._injections[self._numbers] = Injection(self._numbers, operation, nth, code, seconds, offset, repeat)
            return self._numbers

    def injections(self) -> list[Injection]:
        """All active ones, the oldest first."""
        with self._lock:
            return list(self._injections.values())

    def clear(self, number: int | None = None) -> bool:
        """Remove one fault, or all; False if there is none with that number."""
        with self._lock:
            if number is None:
                self._injections.clear()
                return True
            return self._injections.pop(number, None) is not None

    def strike(self, operation: str) -> Injection | None:
        """Count an operation; the oldest fault that hits it, if any."""
        found = None
        with self._lock:
            for injection in list(self._injections.values()):
                if injection.operation != operation:
                    continue
                injection.seen += 1
                if injection.seen % injection.nth == 0 and found is None:
                    found = injection
                    injection.struck += 1
                    if not injection.repeat:
                        del self._injections[injection.number]
        return found


class LabKernel(Kernel):
    """A Kernel that behaves like another one, except where the lab intervenes."""

    def __init__(self, inner: Kernel, lab: Lab, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._inner = inner
        self._lab = lab
        self._sleep = sleep

    def __getattr__(self, name: str) -> Any:  # what a kernel says about itself
        return getattr(self._inner, name)

    def check_mapping(self, fd: int, *, shared: bool) -> None:
        self._inner.check_mapping(fd, shared=shared)

    def probe(self) -> Mapping[str, int | str]:
        return self._inner.probe()

    def close(self) -> None:
        self._inner.close()

    def memfd_create(self, name: str, flags: int) -> int:
        self._strike("create")
        return super().memfd_create(name, flags)

    def create_guest_memfd(self, size: int, flags: int) -> int:
        self._strike("create")
        return self._inner.create_guest_memfd(size, flags)

    def duplicate(self, fd: int, *, readonly: bool = False) -> int:
        self._strike("hand-out")
        return super().duplicate(fd, readonly=readonly)

    def convert(self, fd: int, offset: int, size: int, parts: Sequence[tuple[int, int]], *, private: bool) -> None:
        struck = self._delay("convert")
        if struck is not None and struck.offset is not None:
            raise PageInUse(struck.offset)
        _fail(struck)
        self._inner.convert(fd, offset, size, parts, private=private)

    def populate(self, fd: int, offset: int, size: int, threads: int, *, fresh: bool = False, **how: Any) -> None:
        struck = self._delay("populate")
        if struck is not None and struck.offset:
            self._populate_part(fd, offset, min(size, -(-struck.offset // PAGE_SIZE) * PAGE_SIZE), threads, fresh, how)
        _fail(struck)
        super().populate(fd, offset, size, threads, fresh=fresh, **how)

    def _populate_part(self, fd: int, offset: int, size: int, threads: int, fresh: bool, how: dict[str, Any]) -> None:
        """Allocate the part before the failure, and free it as a failed population does."""
        before = self.resident_ranges(fd, offset, size) if fresh else []
        super().populate(fd, offset, size, threads, fresh=fresh, **how)
        for start, length in without(before, offset, offset + size) if fresh else []:
            self.punch_hole(fd, start, length)

    def _strike(self, operation: str) -> None:
        _fail(self._delay(operation))

    def _delay(self, operation: str) -> Injection | None:
        struck = self._lab.strike(operation)
        if struck is not None and struck.seconds:
            self._sleep(struck.seconds)
        return struck


def _fail(struck: Injection | None) -> None:
    if struck is not None and struck.code is not None:
        raise refuse(struck.code)


class LabNotifier:
    """A Notifier whose `store` the lab makes fail; a delay does not stop the event loop."""

    def __init__(self, inner: Notifier, lab: Lab) -> None:
        self._inner = inner
        self._lab = lab
        self._waiting: Injection | None = None
        self._gate = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def store(self, names: Sequence[str], fds: Sequence[int], ask: bool = False) -> int:
        struck, self._waiting = self._waiting, None
        if struck is None:
            struck = self._lab.strike("store")
            if struck is not None and struck.seconds:
                self._waiting = struck
                os.eventfd_write(self._gate, _FULL)
                timer = threading.Timer(struck.seconds, os.eventfd_read, (self._gate,))
                timer.daemon = True
                timer.start()
                raise refuse(errno.EAGAIN)
        _fail(struck)
        return self._inner.store(names, fds, ask)

    def fileno(self) -> int:
        """An fd that becomes writable when it is time to try again."""
        return self._inner.fileno() if self._waiting is None else self._gate

    def close(self) -> None:
        os.close(self._gate)
        self._inner.close()
