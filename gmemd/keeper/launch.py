"""The keeper's dealings with processes: its messages, fork to exec, limits."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys

from gmemd.posix.lines import Lines

TYPE_CHECKING = False  # typing is not imported: the keeper should be small
if TYPE_CHECKING:
    from typing import NoReturn

FIRST_FD = 3  # SD_LISTEN_FDS_START
EXIT_EXEC = 203  # systemd's status for "could not be executed"
SPARE_FDS = 64  # for the keeper's own


def _lines() -> Lines:
    return Lines(2, excuse=lambda count: f"gmemd-keeper: {count} lines were dropped\n".encode())


_log = _lines()


def log(text: str) -> None:
    """Write a message for the operator to standard error, without waiting for its reader."""
    _log.write(f"gmemd-keeper: {text}\n".encode("utf-8", "backslashreplace"))


def wait_logged(seconds: float = 1.0) -> None:
    """Wait until the messages are written before the process ends, but not indefinitely."""
    _log.wait(seconds)


def become(command: list[str], environ: dict[str, str], fds: list[int], mask: set[int]) -> NoReturn:
    """In the child: become the daemon, with `fds` at 3, 4, ..., all others closed and this signal mask."""
    try:
        os.setsid()  # a terminal's ^C goes to the keeper, which passes it on once
        for handled in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            with contextlib.suppress(OSError):
                signal.signal(handled, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        environ["LISTEN_PID"] = str(os.getpid())
        if "WATCHDOG_USEC" in environ:
            environ["WATCHDOG_PID"] = environ["LISTEN_PID"]
        # first out of the way, then to their places; only what dup2 puts there is inheritable
        above = max([*fds, FIRST_FD + len(fds)]) + 1
        for number, fd in enumerate(fds):
            os.dup2(fd, above + number, inheritable=False)
        for number in range(len(fds)):
            os.dup2(above + number, FIRST_FD + number)
        os.execvpe(command[0], command, environ)
    except BaseException as exc:
        # E2BIG here is $LISTEN_FDNAMES over 128 KiB
        lines = _lines()  # the parent's thread does not exist in this process
        lines.write(f"gmemd-keeper: cannot start {command[0]}: {exc}\n".encode("utf-8", "backslashreplace"))
        lines.wait(1.0)
    os._exit(EXIT_EXEC)


def kill_group(pid: int) -> None:
    """Kill the processes that a dead daemon has left, as systemd's KillMode=control-group would."""
    with contextlib.suppress(OSError):
        group = os.getpgid(pid)
        if group != os.getpgid(0):
            os.killpg(group, signal.SIGKILL)


def fit_limit(wanted: int) -> int:
    """Raise the limit of open files; how many of `wanted` fds can then be held and passed on at once.

    OSError where none can: a daemon told so would keep nothing, and not report it for each object.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard == resource.RLIM_INFINITY:
        return wanted
    room = (hard - SPARE_FDS) // 2
    if room < 1:
        raise OSError(f"a limit of {hard} open files leaves no room for memory: raise it (ulimit -n)")
    return min(wanted, room)


def same_program() -> list[str]:
    """The command line of this process up to "--keeper": the daemon is the program that the keeper is."""
    words = sys.orig_argv
    if "--keeper" in words:
        return [sys.executable, *words[1 : words.index("--keeper")]]
    return [sys.executable, "-m", "gmemd.cli.gmemd"]
