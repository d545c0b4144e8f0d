"""System calls of another process, answered by this one: seccomp user notification (seccomp(2), seccomp_unotify(2)).

A process installs a filter and passes its listener on. What the filter does not name runs as before, at the price of
a few instructions. A call that it names waits for the holder of the listener, who answers it, lets it run, or gives
the process a descriptor. When the last listener is closed such calls fail with ENOSYS.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import select
import struct
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

# asm/unistd.h and linux/audit.h, by machine
_NUMBERS: Final = {  # (AUDIT_ARCH, seccomp, memfd_create, ftruncate, fcntl)
    "x86_64": (0xC000003E, 317, 319, 77, 72),
    "aarch64": (0xC00000B7, 277, 279, 46, 25),
}
F_ADD_SEALS: Final = 1033  # linux/fcntl.h

# linux/seccomp.h
_SET_MODE_FILTER, _NEW_LISTENER, _WAIT_KILLABLE_RECV = 1, 1 << 3, 1 << 5
_ALLOW, _NOTIFY = 0x7FFF0000, 0x7FC00000
_RECV, _SEND, _ID_VALID, _ADDFD = 0xC0502100, 0xC0182101, 0x40082102, 0x40182103
_CONTINUE, _SETFD = 1, 1
_NOTIFICATION, _RESPONSE, _ADD = "=QIIiIQ6Q", "=QqiI", "=QIIII"
_PR_SET_NO_NEW_PRIVS = 38  # linux/prctl.h

# linux/bpf_common.h, linux/filter.h: a word of the call into the accumulator, the jumps, the end
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_NR, _ARCH, _ARGUMENTS = 0, 4, 16  # bytes, in struct seccomp_data

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class Numbers(NamedTuple):
    """The system calls of this machine that a filter may name."""

    arch: int
    seccomp: int
    memfd_create: int
    ftruncate: int
    fcntl: int


class Call(NamedTuple):
    """A call that waits for its answer."""

    id: int
    pid: int  # of the thread
    number: int
    arguments: tuple[int, ...]


def numbers() -> Numbers:
    """Those of this machine; OSError if they are not known here."""
    machine = os.uname().machine
    if machine not in _NUMBERS:
        raise OSError(errno.ENOSYS, f"system calls cannot be captured on {machine}")
    return Numbers(*_NUMBERS[machine])


# -- the filter


def memory_filter(sizes: Sequence[int]) -> bytes:
    """The filter that names what a VMM does to get a memfd: creating one, giving it one of `sizes`, sealing it.

    A change of another file's size is not named, so that a disk can grow without us.
    """
    ours = numbers()
    program = _Program()
    program.load(_ARCH)
    program.unless_equal(ours.arch, "allow")
    program.load(_NR)
    program.if_equal(ours.memfd_create, "notify")
    program.if_equal(ours.ftruncate, "size")
    program.unless_equal(ours.fcntl, "allow")
    program.load(_ARGUMENTS + 8)  # an int: its upper half does not count
    program.if_equal(F_ADD_SEALS, "notify")
    program.end("allow", _ALLOW)
    program.label("size")
    for number, size in enumerate(sizes):
        program.load(_ARGUMENTS + 8)
        program.unless_equal(size & 0xFFFFFFFF, f"not {number}")
        program.load(_ARGUMENTS + 12)
        program.if_equal(size >> 32, "notify")
        program.label(f"not {number}")
    program.end("", _ALLOW)
    program.end("notify", _NOTIFY)
    return program.assembled()


class _Program:
    """Classic BPF, with labels for jumps; they lead forward, and at most 255 instructions far."""

    def __init__(self) -> None:
        self._instructions: list[tuple[int, int, str, str]] = []  # code, operand, labels if true and if not
        self._labels: dict[str, int] = {}

    def load(self, offset: int) -> None:
        self._instructions.append((_LOAD, offset, "", ""))

    def if_equal(self, value: int, label: str) -> None:
        self._instructions.append((_JUMP_IF_EQUAL, value, label, ""))

    def unless_equal(self, value: int, label: str) -> None:
        self._instructions.append((_JUMP_IF_EQUAL, value, "", label))

    def label(self, name: str) -> None:
        self._labels[name] = len(self._instructions)

    def end(self, name: str, action: int) -> None:
        self.label(name)
        self._instructions.append((_RETURN, action, "", ""))

    def assembled(self) -> bytes:
        def jump(at: int, label: str) -> int:
            return self._labels[label] - at - 1 if label else 0

        return b"".join(struct.pack("=HBBI", code, jump(at, true), jump(at, false), operand)
                        for at, (code, operand, true, false) in enumerate(self._instructions))


def install(program: bytes) -> tuple[int, bool]:
    """Filter the calls of this thread and its children from now on; the listener, which the caller owns, and whether
    no_new_privs had to be set for it (setuid programs then run without their rights).

    OSError: EBUSY if there is a listener already, ENOSYS or EINVAL if the kernel cannot do it.
    """
    try:
        return _install(program), False
    except PermissionError:  # without CAP_SYS_ADMIN
        if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
            raise _failure() from None
        return _install(program), True


def _install(program: bytes) -> int:
    code = ctypes.create_string_buffer(program, len(program))
    described = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(code))  # struct sock_fprog
    for flags in (_NEW_LISTENER | _WAIT_KILLABLE_RECV, _NEW_LISTENER):
        listener = int(_libc.syscall(numbers().seccomp, _SET_MODE_FILTER, flags, described))
        if listener >= 0:
            return listener
        if ctypes.get_errno() != errno.EINVAL:  # before Linux 5.19 the first is
            break
    if ctypes.get_errno() == errno.EBUSY:
        raise OSError(errno.EBUSY, "this process has a seccomp supervisor already, and there can be only one")
    raise _failure()


def _failure() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))


# -- the listener


class Listener:
    """The calls of the processes with a filter; owns the descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._others: dict[int, Callable[[], None]] = {}

    def close(self) -> None:
        for other in (self._fd, *self._others):
            os.close(other)

    def watch(self, fd: int, then: Callable[[], None]) -> None:
        """Call `then` once, in `wait`, when a descriptor is readable; it is ours, and closed."""
        self._others[fd] = then
        self._poll.register(fd, select.POLLIN)

    def wait(self, seconds: float | None) -> Call | None:
        """The next call; None: there was none in that time. EOFError: all processes with the filter have ended."""
        for fd, events in self._poll.poll(None if seconds is None else seconds * 1000):
            if fd in self._others:
                self._poll.unregister(fd)
                os.close(fd)
                self._others.pop(fd)()
            elif events & select.POLLIN:
                return self._receive()
            else:
                raise EOFError
        return None

    def _receive(self) -> Call | None:
        data = bytearray(struct.calcsize(_NOTIFICATION))
        try:
            fcntl.ioctl(self._fd, _RECV, data)
        except FileNotFoundError:  # its process was killed meanwhile
            return None
        number, pid, _, call, _, _, *arguments = struct.unpack(_NOTIFICATION, data)
        return Call(number, pid, call, tuple(arguments))

    def waits(self, call: Call) -> bool:
        """Whether the call still waits: if so, what /proc showed of its process is that process's."""
        try:
            fcntl.ioctl(self._fd, _ID_VALID, struct.pack("=Q", call.id))
        except FileNotFoundError:
            return False
        return True

    def give(self, call: Call, fd: int, at: int, *, cloexec: bool) -> None:
        """Put a descriptor in the place of the caller's number `at`; OSError if the call no longer waits."""
        flags = os.O_CLOEXEC if cloexec else 0
        fcntl.ioctl(self._fd, _ADDFD, bytearray(struct.pack(_ADD, call.id, _SETFD, fd, at, flags)))

    def succeed(self, call: Call) -> None:
        """Have the call return 0 without running."""
        self._answer(call, 0)

    def let_run(self, call: Call) -> None:
        """Have the call run as if nothing had been."""
        self._answer(call, _CONTINUE)

    def _answer(self, call: Call, flags: int) -> None:
        with contextlib.suppress(FileNotFoundError):  # its process was killed meanwhile
            fcntl.ioctl(self._fd, _SEND, bytearray(struct.pack(_RESPONSE, call.id, 0, 0, flags)))
