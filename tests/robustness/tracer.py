"""Stop a process at the n-th system call of all its threads: to kill it there, or to make the call fail.

What `strace -f -e inject=...:when=N` does, with two differences: the count runs over all calls of all threads
(strace counts each call by itself), and the end is known: when the daemon waits again with its answer given.

ptrace(2); the traced process is a descendant, which every Yama setting but the strictest allows.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from tests.patience import PATIENCE

# include/uapi/linux/ptrace.h
_POKEUSER, _SYSCALL = 6, 24
_SEIZE, _INTERRUPT, _GET_SYSCALL_INFO = 0x4206, 0x4207, 0x420E
_O_TRACESYSGOOD, _O_TRACECLONE = 0x1, 0x8
_EVENT_STOP = 128
_INFO_ENTRY, _INFO_EXIT = 1, 2
_ALL, _NO_THREAD = 0x40000000, 0x20000000  # __WALL, __WNOTHREAD of include/uapi/linux/wait.h

FIRST = -1  # of the calls that may be struck

# struct user_regs_struct of x86-64
_RAX, _ORIG_RAX = 10 * 8, 15 * 8
CAN_FAIL = os.uname().machine == "x86_64"  # a call can be made to fail here

_NAMES_X86_64 = {
    0: "read", 1: "write", 3: "close", 5: "fstat", 7: "poll", 8: "lseek", 9: "mmap", 10: "mprotect", 11: "munmap",
    12: "brk", 13: "rt_sigaction", 14: "rt_sigprocmask", 16: "ioctl", 17: "pread64", 18: "pwrite64", 20: "writev",
    22: "pipe", 24: "sched_yield", 25: "mremap", 27: "mincore", 28: "madvise", 32: "dup", 33: "dup2", 39: "getpid",
    41: "socket", 42: "connect", 44: "sendto", 45: "recvfrom", 46: "sendmsg", 47: "recvmsg", 54: "setsockopt",
    55: "getsockopt", 56: "clone", 60: "exit", 72: "fcntl", 74: "fsync", 75: "fdatasync", 77: "ftruncate",
    79: "getcwd", 82: "rename", 83: "mkdir", 87: "unlink", 89: "readlink", 91: "fchmod", 99: "sysinfo",
    102: "getuid", 107: "geteuid", 137: "statfs", 138: "fstatfs", 186: "gettid", 202: "futex", 203: "sched_setaffinity",
    204: "sched_getaffinity", 217: "getdents64", 228: "clock_gettime", 230: "clock_nanosleep", 231: "exit_group",
    232: "epoll_wait", 233: "epoll_ctl", 234: "tgkill", 237: "mbind", 238: "set_mempolicy", 257: "openat",
    262: "newfstatat", 263: "unlinkat", 267: "readlinkat", 273: "set_robust_list", 281: "epoll_pwait",
    285: "fallocate", 288: "accept4", 291: "epoll_create1", 293: "pipe2", 295: "preadv", 296: "pwritev",
    302: "prlimit64", 318: "getrandom", 319: "memfd_create", 327: "preadv2", 332: "statx", 334: "rseq",
    424: "pidfd_send_signal", 434: "pidfd_open", 435: "clone3", 436: "close_range",
    439: "faccessat2", 441: "epoll_pwait2", 451: "cachestat",
}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


@dataclass
class Outcome:
    """How far it came."""

    calls: list[str] = field(default_factory=list)  # system calls begun, in order; NAME* of another thread
    hit: str = ""  # the call at which something was done; "": it was not reached
    dead: bool = False  # the process has ended
    hung: bool = False  # no answer came, and the process was killed

    @property
    def reached(self) -> bool:
        return bool(self.hit)


class Tracer:
    """Runs one act under observation.

    `at`: which call from 1 on, 0 none, FIRST the first that may be; `error`: an errno, 0: SIGKILL; `may`: whether a
    call is to be struck.
    """

    def __init__(self, pid: int, *, at: int = 0, error: int = 0, may: Callable[[str], bool] = lambda _: True) -> None:
        self._pid = pid
        self._at = at
        self._error = error
        self._may = may
        self._outcome = Outcome()
        self._failing: set[int] = set()  # threads inside the call that is to fail
        self._info = ctypes.create_string_buffer(96)
        self._raised: BaseException | None = None

    def run(self, begin: Callable[[], None] | None, ended: Callable[[], bool]) -> Outcome:
        """Let the stopped process go on after `begin()` until it is dead, or `ended()` when its main thread waits.

        All in a thread of its own: its end sets the process free, wherever it stands.
        """
        thread = threading.Thread(target=self._guarded, args=(begin, ended))
        thread.start()
        thread.join(PATIENCE)
        if thread.is_alive():
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            thread.join()
            self._outcome.hung = True
        if self._raised is not None:
            raise self._raised
        return self._outcome

    def _guarded(self, begin: Callable[[], None] | None, ended: Callable[[], bool]) -> None:
        try:
            self._run(begin, ended)
        except BaseException as exc:
            self._raised = exc

    def _run(self, begin: Callable[[], None] | None, ended: Callable[[], bool]) -> None:
        threads = []
        for tid in map(int, os.listdir(f"/proc/{self._pid}/task")):
            if self._taken(tid):
                threads.append(tid)
        if begin is not None:
            begin()
        for tid in threads:
            self._go_on(tid)
        over = False
        while not over:
            try:
                tid, status = os.waitpid(-1, _ALL | _NO_THREAD)
            except ChildProcessError:
                return
            if os.WIFSTOPPED(status):
                over = self._stopped(tid, status, ended)
            else:
                self._outcome.dead |= tid == self._pid

    def _taken(self, tid: int) -> bool:
        """Trace a thread, which stands still then; False: it has just ended."""
        try:
            _ptrace(_SEIZE, tid, 0, _O_TRACESYSGOOD | _O_TRACECLONE)
        except ProcessLookupError:
            if tid == self._pid:
                raise
            return False
        with contextlib.suppress(ProcessLookupError):
            _ptrace(_INTERRUPT, tid)
        return os.WIFSTOPPED(os.waitpid(tid, _ALL)[1])

    def _stopped(self, tid: int, status: int, ended: Callable[[], bool]) -> bool:
        """Deal with a thread that has stopped; True: it is over."""
        number = os.WSTOPSIG(status)
        if number == signal.SIGTRAP | 0x80:
            return self._system_call(tid, ended)
        self._go_on(tid, 0 if status >> 16 or number == signal.SIGTRAP else number)
        return False

    def _system_call(self, tid: int, ended: Callable[[], bool]) -> bool:
        """Deal with a thread that stands at the begin or the end of a call; True: it is over."""
        try:
            _ptrace(_GET_SYSCALL_INFO, tid, len(self._info), ctypes.addressof(self._info))
        except ProcessLookupError:
            return False  # killed meanwhile
        stage, number = self._info.raw[0], struct.unpack_from("<Q", self._info.raw, 24)[0]
        if stage == _INFO_EXIT and tid in self._failing:
            self._failing.discard(tid)
            _ptrace(_POKEUSER, tid, _RAX, -self._error)
        if stage == _INFO_ENTRY:
            outcome, name = self._outcome, call_name(number)
            waits = name.startswith(("epoll_", "poll")) and name != "epoll_ctl"
            if tid == self._pid and waits and ended():
                return True
            outcome.calls.append(name if tid == self._pid else f"{name}*")
            if not outcome.hit and self._at in (len(outcome.calls), FIRST) and self._may(outcome.calls[-1]):
                self._strike(tid, name)
        self._go_on(tid)
        return False

    def _strike(self, tid: int, name: str) -> None:
        self._outcome.hit = self._outcome.calls[-1]
        if self._error:
            if name != "close":  # it frees the number whatever it returns
                _ptrace(_POKEUSER, tid, _ORIG_RAX, -1)  # no such call: nothing happens
            self._failing.add(tid)
        else:
            os.kill(self._pid, signal.SIGKILL)

    @staticmethod
    def _go_on(tid: int, number: int = 0) -> None:
        with suppress(ProcessLookupError):
            _ptrace(_SYSCALL, tid, 0, number)


def call_name(number: int) -> str:
    """The name of a system call, as far as a daemon makes it."""
    name = _NAMES_X86_64.get(number) if CAN_FAIL else None
    return name or f"syscall-{number}"


def _ptrace(request: int, tid: int, address: int = 0, data: int = 0) -> None:
    if _libc.ptrace(request, tid, address, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace: {os.strerror(number)}")


def why_not() -> str:
    """Why nothing can be traced here; "" when it can."""
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    try:
        Tracer(pid, at=1).run(lambda: os.kill(pid, signal.SIGKILL), lambda: False)
    except OSError as exc:
        return f"ptrace is not allowed: {exc.strerror}" if exc.errno != errno.ESRCH else ""
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):  # it was waited for as a traced one
            os.waitpid(pid, 0)
    return ""
