"""Capturing: the memfds that a VMM creates for its guest become, or are replaced by, gmemd's.

The VMM's command line is as ever. It is stopped in three calls (`seccomp.memory_filter`):
- ftruncate of an empty memfd to the size of an object that is still free: the descriptor is replaced by the object's;
- F_ADD_SEALS of what is gmemd's: answered, because the size of that is fixed already; of another memfd for a guest,
  where new ones are wanted: it is sealed against changes of its size, and adopted;
- memfd_create: it runs as ever, and what comes of it is looked at until it has a size, because a VMM may leave out the
  seals.
What is not for a guest, as the memfds with which QEMU tries what the kernel can, runs as ever.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import NamedTuple

from gmemd.errors import QmpError
from gmemd.vmm.memfds import File, Memfd, closes_on_exec, describe, look, memfds, path, process_of
from gmemd.vmm.seccomp import F_ADD_SEALS, Call, Listener, numbers

_SHRINK, _GROW, _SEAL = 0x02, 0x04, 0x01  # linux/fcntl.h, F_SEAL_*
_SIZE_SEALS = _SEAL | _SHRINK | _GROW
_LOOK_EVERY, _LOOK_FOR = 0.02, 10.0  # seconds


class Memory(NamedTuple):
    """An object that waits for its VMM, with a descriptor of it."""

    id: str
    size: int  # bytes
    fd: int


class Capture:
    """The supervisor's decisions. `objects`: what is handed in, those of equal size in this order; their descriptors
    are ours, and closed. `new`: the ids under which more is adopted, in this order.

    `claim` makes a process the runner of an object, before it gets it: QmpError if another guest runs on it.
    `adopt` makes an object of a process's descriptor, which it borrows (QmpError, OSError). `say` is told what happens.
    """

    def __init__(self, objects: Sequence[Memory], new: Sequence[str], names: Collection[str], *,
                 claim: Callable[[str, int], None], adopt: Callable[[str, int, int], None],
                 say: Callable[[str], None]) -> None:
        self._free = list(objects)
        self._new = list(new)
        self._names = names
        self._claim, self._adopt, self._say = claim, adopt, say
        self._files: set[File] = set()  # what is gmemd's
        self._told: set[File] = set()  # what is said to be not
        self._watched: dict[int, float] = {}  # process: until when (monotonic seconds)

    def serve(self, listener: Listener) -> None:
        """Answer until all processes of the VMM have ended; whatever happens, no call stays without an answer."""
        with contextlib.suppress(EOFError):
            while True:
                call = listener.wait(_LOOK_EVERY if self._watched else None)
                if call is not None:
                    self._answer(listener, call)
                self._look_around()
        for memory in self._free:
            self._say(f"'{memory.id}' was not used: no memfd of a guest got its size, {_text(memory.size)}")
        for name in self._new:
            self._say(f"'{name}' was not created: there was no memfd of a guest for it")

    def _answer(self, listener: Listener, call: Call) -> None:
        answered = False
        try:
            answered = self._decide(listener, call)
        except (OSError, ValueError, StopIteration) as exc:  # the process has ended, or may not be looked at
            self._say(f"a call of {describe(call.pid)} ran as ever: {getattr(exc, 'strerror', None) or exc}")
        finally:
            (listener.succeed if answered else listener.let_run)(call)

    def _decide(self, listener: Listener, call: Call) -> bool:
        """Do what a call is answered by; False: it is to run."""
        ours = numbers()
        if call.number == ours.memfd_create:
            self._watched[process_of(call.pid)] = time.monotonic() + _LOOK_FOR
            return False
        found = look(call.pid, call.arguments[0] & 0x7FFFFFFF)
        if found is None:
            return False
        if call.number == ours.ftruncate:
            return self._sized(listener, call, found, call.arguments[1])
        if call.number == ours.fcntl and call.arguments[1] & 0xFFFFFFFF == F_ADD_SEALS:
            return self._sealed(listener, call, found, call.arguments[2])
        return False

    def _sized(self, listener: Listener, call: Call, found: Memfd, size: int) -> bool:
        if found.file in self._files:
            return found.size == size
        memory = next((one for one in self._free if one.size == size), None)
        if found.size or memory is None or not found.is_memory(self._names):
            return False
        pid = process_of(call.pid)
        cloexec = closes_on_exec(call.pid, found.fd)
        if not self._claimed(memory, pid):
            return False
        listener.give(call, memory.fd, found.fd, cloexec=cloexec)
        self._free.remove(memory)
        self._now_ours(memory.id, memory.fd, pid, found, size)
        os.close(memory.fd)
        return True

    def _claimed(self, memory: Memory, pid: int) -> bool:
        """Make a process the runner; False: another guest runs on that memory."""
        try:
            self._claim(memory.id, pid)
        except QmpError as exc:
            self._say(f"'{memory.id}' is not given to {describe(pid)}: {exc.desc}")
            return False
        except OSError as exc:  # gmemd is being restarted: no reason to have a guest on other memory
            self._say(f"gmemd does not know that {describe(pid)} runs a guest on '{memory.id}': {exc}")
        return True

    def _sealed(self, listener: Listener, call: Call, found: Memfd, seals: int) -> bool:
        if found.file not in self._files:
            self._adopt_new(process_of(call.pid), found, partial(listener.waits, call))
        return found.file in self._files and not seals & ~_SIZE_SEALS

    def _look_around(self) -> None:
        """Look at the memfds of processes that have created some: has one a size that nobody has noticed?"""
        now = time.monotonic()
        for pid, until in list(self._watched.items()):
            try:
                for found in memfds(pid):
                    self._adopt_new(pid, found, partial(_is_still, pid, found))
            except OSError:
                until = now
            if now >= until:
                del self._watched[pid]

    def _adopt_new(self, pid: int, found: Memfd, still: Callable[[], bool]) -> None:
        """Adopt a process's memfd if it is a guest's and there is an id for it, else say once that it is left alone.

        `still`: whether the process and its descriptor are still the same, once it was opened.
        """
        if not found.size or found.file in self._files | self._told or not found.is_memory(self._names):
            return
        self._told.add(found.file)
        if not self._new:
            wanted = "no object of that size is left for it" if self._free or self._files else "no object is for it"
            return self._leave(pid, found, wanted)
        try:
            fd = os.open(path(pid, found.fd), os.O_RDWR | os.O_CLOEXEC)
        except OSError as exc:
            return self._leave(pid, found, f"it cannot be opened: {exc.strerror}")
        try:
            if not still():
                self._told.discard(found.file)
                return
            seal(fd)
            self._adopt(self._new[0], fd, pid)
            self._now_ours(self._new.pop(0), fd, pid, found, found.size)
        except (QmpError, OSError) as exc:
            self._leave(pid, found, f"it cannot become '{self._new[0]}': {getattr(exc, 'desc', None) or exc}")
        finally:
            os.close(fd)

    def _now_ours(self, name: str, fd: int, pid: int, found: Memfd, size: int) -> None:
        status = os.fstat(fd)
        self._files.add((status.st_dev, status.st_ino))
        self._say(f"'{name}' is the memory of {describe(pid)}: memfd '{found.name}', {_text(size)}")

    def _leave(self, pid: int, found: Memfd, why: str) -> None:
        self._say(f"memfd '{found.name}' of {describe(pid)}, {_text(found.size)}, stays its own: {why}")


def _text(size: int) -> str:
    return f"{size} bytes" if size % (1 << 20) else f"{size >> 20} MiB"


def _is_still(pid: int, found: Memfd) -> bool:
    return look(pid, found.fd) == found


def seal(fd: int) -> None:
    """Fix the size of a memfd, if it can be sealed; its content can still be sealed afterwards."""
    with contextlib.suppress(OSError):  # sealed against that, or a guest_memfd, whose size is fixed
        fcntl.fcntl(fd, F_ADD_SEALS, _SHRINK | _GROW)
