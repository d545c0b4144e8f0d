"""`gmemd --keeper`: a small parent process that plays the service manager where there is none.

It holds the fds, makes the listening sockets, starts the daemon and starts it again whenever it ends, by
the very protocol of systemd (sd_notify(3), sd_listen_fds(3)): the daemon cannot tell the difference. What
corresponds:

  Type=notify, NotifyAccess=main, Restart=always, StartLimitIntervalSec=0, WatchdogSec=,
  FileDescriptorStoreMax=

So a daemon that ends by `quit` is started again with its memory, and what a dead one leaves running is
killed. SIGTERM or SIGINT to the keeper ends daemon and keeper, and with them the memory, as does the
keeper's own death: it is the memory's anchor. SIGHUP, SIGQUIT, SIGUSR1 and SIGUSR2 are passed on. One thing
differs from systemd: a daemon that exits before it was ever ready, with nothing held, ends the keeper with
its status, so that a wrong option is seen at once.

Usage: gmemd --keeper [--listen [NAME=]PATH]... [--listen-mode OCTAL] [--listen-group GROUP] [--fdstore-max
N]
       [--watchdog SECONDS] [--restart-delay SECONDS] [--start-timeout SECONDS] [--stop-timeout SECONDS]
       [--] DAEMON-ARGUMENT... | --exec COMMAND ARGUMENT...

Imports little on purpose (no dataclasses, no typing): its memory is paid per container, and what it does
not import cannot fail in it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import sys
import time
from array import array
from collections.abc import Callable
from time import monotonic

from gmemd.persist.kept import KeptFds, valid_name
from gmemd.persist.launch import become, fit_limit, kill_group, listen_on, parent, same_program, unlink

FDSTORE_MAX = 1024  # as in the shipped unit
MESSAGE_MAX = 4096  # bytes, as systemd's NOTIFY_BUFFER_MAX: a longer one is ignored with its fds
RIGHTS_MAX = 253  # fds a message, the kernel's SCM_MAX_FD

ROUND = 1000  # messages; a daemon gone mad must not keep us from our signals
RESTART_DELAY = 0.1  # seconds, RestartSec= of the shipped unit; doubled at each start that fails
RESTART_DELAY_MAX = 5.0  # seconds
STEADY = 1.0  # seconds; a daemon that served this long is started again at once

_ANCILLARY = socket.CMSG_SPACE(RIGHTS_MAX * 4) + socket.CMSG_SPACE(12)
_RECEIVE_FLAGS = int(socket.MSG_CMSG_CLOEXEC)
_SCM_RIGHTS, _SCM_CREDENTIALS = int(socket.SCM_RIGHTS), int(socket.SCM_CREDENTIALS)
_CREDENTIALS = struct.Struct("iII")  # struct ucred: pid, uid, gid
_PASSED_ON = (signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_ENDING = (signal.SIGTERM, signal.SIGINT)


class Options:
    """How the keeper was asked to work. Times are in seconds."""

    def __init__(self, command: list[str], *, fdstore_max: int = FDSTORE_MAX) -> None:
        self.command = command
        self.listen: list[tuple[str, str]] = []  # name in $LISTEN_FDNAMES, path
        self.listen_mode = 0o660
        self.listen_group = ""
        self.fdstore_max = fdstore_max
        self.watchdog = 0.0  # 0: none
        self.restart_delay = RESTART_DELAY
        self.start_timeout = 90.0  # to READY=1
        self.stop_timeout = 10.0  # from SIGTERM to SIGKILL
        self.abort_timeout = 5.0  # from the watchdog's SIGABRT to SIGKILL


class Keeper:
    """One daemon, its sockets and its fds. `run` is the whole life."""

    def __init__(self, options: Options) -> None:
        """Make the sockets. OSError when that fails, nothing is left then."""
        self._options = options
        self.kept = KeptFds(fit_limit(options.fdstore_max))
        self._listeners: list[tuple[str, socket.socket]] = []
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._notify_path = ""
        try:
            self._bind()
        except BaseException:
            self.close()
            raise
        self.pid = 0  # of the daemon, 0: none runs
        self.was_ready = self._ever_ready = False
        self._started = 0.0  # monotonic seconds
        self._failures = 0  # starts in a row that did not get ready
        self._ending = False
        self._status = 0  # to exit with
        self._watchdog = options.watchdog  # seconds; the daemon may change it
        self._due: dict[str, float] = {}  # what happens when, monotonic seconds

    def run(self) -> int:
        """Keep the daemon until told to end; the exit status."""
        woken, waker = os.pipe()
        os.set_blocking(waker, False)
        old_waker = signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        handled = (*_ENDING, *_PASSED_ON, signal.SIGCHLD)
        old_handlers = {number: signal.signal(number, _noted) for number in handled}
        poll = select.poll()
        poll.register(self._notify, select.POLLIN)
        poll.register(woken, select.POLLIN)
        try:
            self._start()
            while self.pid or not self._ending:
                try:
                    self._turn(poll, woken)
                except (OSError, MemoryError) as exc:  # the machine is short of something; the memory is held
                    self._log(f"{exc}")
                    time.sleep(RESTART_DELAY)
        finally:
            signal.set_wakeup_fd(old_waker)
            for number, handler in old_handlers.items():
                signal.signal(number, handler)
            os.close(woken)
            os.close(waker)
        return self._status

    def _turn(self, poll: select.poll, woken: int) -> None:
        """Wait for the next thing to do, and do it."""
        events = poll.poll(self._patience())
        self.receive()  # before the reaping: the last words of a dead daemon count
        if any(fd == woken for fd, _ in events):
            self._signals(os.read(woken, 4096))
        self._deadlines()

    def close(self) -> None:
        """Take the sockets away and let the memory go."""
        self.kept.close()
        for _, listener in self._listeners:
            unlink(listener.getsockname())
            listener.close()
        self._notify.close()
        if self._notify_path:
            unlink(self._notify_path)

    # -- sockets ---------------------------------------------------------------------------------------------
    def _bind(self) -> None:
        for name, path in self._options.listen:
            self._listeners.append((name, listen_on(path, self._options.listen_mode, self._options.listen_group)))
        if self._listeners:
            # beside the first socket, because that directory can be written; only this user may send
            path = f"{self._options.listen[0][1]}.notify"
            unlink(path)
            umask = os.umask(0o177)
            try:
                self._notify.bind(path)
            finally:
                os.umask(umask)
            self._notify_path = path
        else:
            self._notify.bind("")  # an abstract name that the kernel chooses
        self._notify.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._notify.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)

    # -- the daemon's life -----------------------------------------------------------------------------------
    def _start(self) -> None:
        self.was_ready = False
        self._started = monotonic()
        self._watchdog = self._options.watchdog
        self._due = {"start": self._started + self._options.start_timeout}
        fds = [(name, listener.fileno()) for name, listener in self._listeners] + self.kept.newest_first()
        environ = self.environ([name for name, _ in fds])
        # a signal that comes between fork and exec must not be swallowed by our handler in the child
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self.pid = os.fork()
            if self.pid == 0:
                signal.set_wakeup_fd(-1)
                become(self._options.command, environ, [fd for _, fd in fds], set(map(int, mask)))
        except OSError as exc:
            self._due = {"restart": monotonic() + RESTART_DELAY_MAX}
            self._log(f"cannot fork: {os.strerror(exc.errno or 0)}")
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def environ(self, names: list[str]) -> dict[str, str]:
        address = self._notify.getsockname()
        environ = dict(os.environ)
        environ["NOTIFY_SOCKET"] = address if isinstance(address, str) else "@" + address[1:].decode()
        environ["FDSTORE"] = str(self.kept.limit)
        environ["LISTEN_FDS"] = str(len(names))
        environ["LISTEN_FDNAMES"] = ":".join(names)
        if self._options.watchdog:
            environ["WATCHDOG_USEC"] = str(int(self._options.watchdog * 1e6))
        return environ

    def _ended(self, status: int) -> None:
        """The daemon is gone: end with it, or plan its next start. A negative status is a signal."""
        lived = monotonic() - self._started
        self.pid, self._due = 0, {}
        if self._ending:
            self._status = 0 if status in (0, -signal.SIGTERM, -signal.SIGINT) else _exit_status(status)
            return
        if not self._ever_ready and not len(self.kept) and status >= 0:
            self._log(f"the daemon ended with status {status} before it was ready")
            self._ending, self._status = True, status
            return
        delay = self.delay(lived)
        self._log(f"the daemon {_said(status)}, {len(self.kept)} fds held, next start in {delay:g} s")
        self._due = {"restart": monotonic() + delay}

    def delay(self, lived: float) -> float:
        """Seconds until the next start: at once after steady service, ever later after failures."""
        if self.was_ready:
            self._failures = 0
            return 0.0 if lived >= STEADY else self._options.restart_delay
        self._failures += 1
        return min(self._options.restart_delay * 2.0 ** min(self._failures - 1, 16), RESTART_DELAY_MAX)

    def _signals(self, numbers: bytes) -> None:
        for number in dict.fromkeys(numbers):
            if number == signal.SIGCHLD:
                self._reap()
            elif number in _ENDING:
                self._end()
            elif self.pid:
                self._kill(number)

    def _reap(self) -> None:
        """Collect the dead; as pid 1 also those of others."""
        while True:
            try:
                dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if dead is None:
                return
            if dead.si_pid == self.pid:
                kill_group(self.pid)  # while its number cannot be another's
            _, status = os.waitpid(dead.si_pid, 0)
            if dead.si_pid == self.pid:
                while self.receive():  # all its last words
                    pass
                self._ended(os.waitstatus_to_exitcode(status))

    def _end(self) -> None:
        self._ending = True
        if self.pid:
            self._kill(signal.SIGTERM)
            self._due = {"kill": monotonic() + self._options.stop_timeout}

    def _kill(self, number: int) -> None:
        with contextlib.suppress(OSError):
            os.kill(self.pid, number)

    # -- time ------------------------------------------------------------------------------------------------
    def _patience(self) -> float | None:
        """Milliseconds until something is due, at most an hour: poll(2) takes no longer time."""
        if not self._due:
            return None
        return min(max(0.0, min(self._due.values()) - monotonic()), 3600.0) * 1000 + 1

    def _deadlines(self) -> None:
        now = monotonic()
        for what in [what for what, when in self._due.items() if when <= now]:
            self._due.pop(what, None)
            if what == "restart":
                self._start()
            elif what == "kill":
                self._log("the daemon does not end, killed")
                self._kill(signal.SIGKILL)
            else:
                limit = self._watchdog if what == "watchdog" else self._options.start_timeout
                self._abort(f"{what} time-out of {limit:g} s")

    def _abort(self, why: str) -> None:
        self._log(f"{why}: the daemon is aborted")
        self._kill(signal.SIGABRT)
        self._due = {"kill": monotonic() + self._options.abort_timeout}

    # -- messages --------------------------------------------------------------------------------------------
    def receive(self) -> bool:
        """Work through the messages in the queue; True: there may be more."""
        for _ in range(ROUND):
            try:
                data, ancillary, flags, _ = self._notify.recvmsg(MESSAGE_MAX, _ANCILLARY, _RECEIVE_FLAGS)
            except BlockingIOError:
                return False
            fds, pid = array("i"), 0
            for _, kind, value in ancillary:
                if kind == _SCM_RIGHTS:
                    fds.frombytes(value[: len(value) & ~3])
                elif kind == _SCM_CREDENTIALS:
                    pid = _CREDENTIALS.unpack(value)[0]
            # a barrier is anyone's, and the close is its answer
            if data != b"BARRIER=1" and self._acceptable(pid, flags):
                self._message(data, fds)
            for fd in fds:
                with contextlib.suppress(OSError):
                    os.close(fd)
        return True

    def _acceptable(self, pid: int, flags: int) -> bool:
        """Is a message whole and the daemon's?"""
        if flags == _RECEIVE_FLAGS and pid == self.pid != 0:
            return True
        if flags & socket.MSG_TRUNC:
            self._log("a message of more than 4,096 bytes is ignored")
            return False
        if pid == 0 or pid != self.pid:
            self._log(f"a message of process {pid}, which is not the daemon, is ignored")
            return False
        if flags & socket.MSG_CTRUNC:
            self._log("fds of a message were lost: too many open files")
        return True

    def _message(self, data: bytes, fds: array[int]) -> None:
        """Act on one message of the daemon; fds that are kept are taken out of `fds`."""
        lines = data.split(b"\n")
        if len(lines) == 2 and lines[1].startswith(b"FDNAME="):  # the usual ones, fast
            if lines[0] == b"FDSTORE=1":
                return self._store(valid_name(lines[1][7:]), fds)
            if lines[0] == b"FDSTOREREMOVE=1":
                return self.kept.drop(valid_name(lines[1][7:]))
        fields: dict[bytes, bytes] = {}
        for line in lines:
            key, equals, value = line.partition(b"=")
            if equals:
                fields.setdefault(key, value)  # of a key given twice the first counts
        self._act(fields, fds)

    def _act(self, fields: dict[bytes, bytes], fds: array[int]) -> None:
        if fields.get(b"FDSTORE") == b"1":
            self._store(valid_name(fields.get(b"FDNAME", b"stored")), fds)
        elif fields.get(b"FDSTOREREMOVE") == b"1":
            self.kept.drop(valid_name(fields.get(b"FDNAME", b"stored")))
        if fields.get(b"READY") == b"1":
            self.was_ready = self._ever_ready = True
            self._due.pop("start", None)
            self._feed()
        if b"WATCHDOG" in fields or b"WATCHDOG_USEC" in fields:
            self._watchdog_message(fields)
        if b"MAINPID" in fields:
            self._main_pid(fields[b"MAINPID"])

    def _store(self, name: str, fds: array[int]) -> None:
        for fd in fds.tolist():
            try:
                kept = self.kept.take(name, fd)
            except OSError as exc:
                self._log(f"'{name}' is not kept: {os.strerror(exc.errno or 0)}")
                continue
            if kept:
                fds.remove(fd)
            elif len(self.kept) >= self.kept.limit:
                self._log(f"the store is full with {self.kept.limit} fds, '{name}' is not kept")

    def _feed(self) -> None:
        if self._watchdog and self.was_ready and not self._ending and "kill" not in self._due:
            self._due["watchdog"] = monotonic() + self._watchdog

    def _watchdog_message(self, fields: dict[bytes, bytes]) -> None:
        usec = fields.get(b"WATCHDOG_USEC", b"")
        if usec.isdigit():
            self._watchdog = min(int(usec), 10**15) / 1e6
            self._due.pop("watchdog", None)
        if fields.get(b"WATCHDOG") == b"trigger":
            self._abort("watchdog triggered")
        else:
            self._feed()

    def _main_pid(self, value: bytes) -> None:
        """The daemon names its successor; only a child of ours will do, else its end would pass unseen."""
        if value.isdigit() and len(value) < 10 and parent(int(value)) == os.getpid():
            self.pid = int(value)
        else:
            self._log(f"MAINPID={value[:20]!r} is no child of the keeper, ignored")

    def _log(self, text: str) -> None:
        with contextlib.suppress(OSError):
            os.write(2, f"gmemd-keeper: {text}\n".encode())


def run_keeper(argv: list[str]) -> int:
    """The keeper's main, argv without "--keeper"; 0: ended as asked, 1: not started, or the daemon's."""
    try:
        keeper = Keeper(parse(argv))
    except (OSError, ValueError, LookupError) as exc:
        print(f"gmemd --keeper: {exc}", file=sys.stderr)
        return 1
    try:
        return keeper.run()
    finally:
        keeper.close()


def parse(argv: list[str]) -> Options:
    """The keeper's own options from the front of argv; the first other word begins the daemon's arguments."""
    options = Options([])
    rest = list(argv)
    while rest:
        option, equals, value = rest[0].partition("=")
        if option == "--exec":
            options.command = rest[1:]
            return options
        if option not in _OPTIONS:
            break
        if not equals and len(rest) < 2:
            raise ValueError(f"{option} needs a value")
        rest.pop(0)
        _set(options, option, value if equals else rest.pop(0))
    if rest[:1] == ["--"]:
        rest.pop(0)
    options.command = [*same_program(), *rest]
    return options


_OPTIONS: dict[str, Callable[[str], object]] = {
    "--listen": str,
    "--listen-mode": lambda text: int(text, 8),
    "--listen-group": str,
    "--fdstore-max": int,
    "--watchdog": float,
    "--restart-delay": float,
    "--start-timeout": float,
    "--stop-timeout": float,
    "--abort-timeout": float,
}


def _set(options: Options, option: str, text: str) -> None:
    if option == "--listen":
        name, equals, path = text.partition("=")
        options.listen.append((name, path) if equals and "/" not in name else ("qmp", text))
        return
    try:
        setattr(options, option[2:].replace("-", "_"), _OPTIONS[option](text))
    except ValueError:
        raise ValueError(f"{option}: '{text}' is no number") from None


def _noted(number: int, frame: object) -> None:
    """The wake-up fd has the signal's number; a handler must be there for it to be written."""


def _said(status: int) -> str:
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"


def _exit_status(status: int) -> int:
    """As a shell gives it on."""
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    sys.exit(run_keeper(sys.argv[1:]))
