"""`gmemd --keeper`: a small parent process that acts as the service manager where there is none.

It holds the fds, creates the listening sockets, starts the daemon and restarts it whenever it ends, using systemd's own
protocol (sd_notify(3), sd_listen_fds(3)): the daemon cannot tell the difference. It does what these settings do:

  Type=notify, NotifyAccess=main, Restart=always, StartLimitIntervalSec=0, WatchdogSec=,
  FileDescriptorStoreMax=

In addition, a barrier reports success: it delivers a byte before its end if everything sent is held. A message of
FDSTORE or FDSTOREREMOVE may have FDNAMES=A:B:C instead of FDNAME=A, each for one descriptor, and may end with ANSWER=1:
then a byte, "1" or "0", goes into the pipe whose end ANSWERS=1 has brought. In one brought by ANSWERS=2, "2" says that
all is held, and that as many more fds of memory as SURE says will be: the daemon need not wait to hear it.

A daemon that ends by `quit` is thus restarted with its memory, and processes that a dead one leaves are killed. SIGTERM
or SIGINT to the keeper ends daemon and keeper, and with them the memory, as does the keeper's own death. SIGHUP,
SIGQUIT, SIGUSR1 and SIGUSR2 are passed on. One thing differs from systemd: if a daemon exits before it was ever ready,
with nothing held, the keeper exits with its status, so that a wrong option shows at once.

The command line is in options.py.

Imports little on purpose (no dataclasses, no typing): every container pays for its memory, and what it does not import
cannot fail.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from array import array
from time import monotonic

from gmemd.keeper import BARRIER_ANSWERS, SEVERAL, SURE
from gmemd.keeper.kept import PROMISED, KeptFds, valid_name
from gmemd.keeper.launch import become, fit_limit, kill_group, log, wait_logged
from gmemd.keeper.listening import Listening
from gmemd.keeper.mailbox import Mailbox, fields_of
from gmemd.keeper.options import RESTART_DELAY, Options, parse
from gmemd.keeper.signals import noted
from gmemd.posix.streams import open_standard_streams, say

RESTART_DELAY_MAX = 5.0  # seconds
STEADY = 1.0  # seconds; a daemon that served this long is started again at once

_SEVERAL = 64  # names in a message, at most

_PASSED_ON = (signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_ENDING = (signal.SIGTERM, signal.SIGINT)


class Keeper:
    """One daemon, its sockets and its fds; `run` is its whole life."""

    def __init__(self, options: Options) -> None:
        """Create the sockets. OSError when that fails; nothing is left then."""
        self._options = options
        self.kept = KeptFds(fit_limit(options.fdstore_max))
        self._listening = Listening(options.listen, options.listen_mode, options.listen_group)
        try:
            # next to the first socket, because that directory is writable
            self.mailbox = Mailbox(f"{options.listen[0][1]}.notify" if options.listen else "")
        except BaseException:
            self._listening.close()
            raise
        self.pid = 0  # of the daemon; 0: none runs
        self.was_ready = self._ever_ready = False
        self._started = 0.0  # monotonic seconds
        self._failures = 0  # consecutive starts that did not get ready
        self._ending = False
        self._status = 0  # to exit with
        self._due: dict[str, float] = {}  # what is due when, monotonic seconds

    def run(self) -> int:
        """Keep the daemon until told to end; the exit status."""
        self._due = {"restart": monotonic()}
        with noted((*_ENDING, *_PASSED_ON, signal.SIGCHLD)) as woken:
            poll = select.poll()
            poll.register(self.mailbox, select.POLLIN)
            poll.register(woken, select.POLLIN)
            while self.pid or not self._ending:
                try:
                    self._turn(poll, woken)
                except (OSError, MemoryError) as exc:  # the machine is short of something; the memory is held
                    log(f"{exc}")
                    time.sleep(RESTART_DELAY)
                    signal.raise_signal(signal.SIGCHLD)  # a dead daemon may not have been reaped
        return self._status

    def _turn(self, poll: select.poll, woken: int) -> None:
        """Wait for the next thing to do, and do it."""
        events = poll.poll(self._patience() if self._due else None)
        self.receive()  # before reaping: the last messages of a dead daemon count
        for fd, _ in events:
            if fd == woken:
                self._signals(os.read(woken, 4096))
        if self._due:
            self._deadlines()

    def close(self) -> None:
        """Remove the sockets and free the memory."""
        self.kept.close()
        self._listening.close()
        self.mailbox.close()

    # -- the daemon's life -----------------------------------------------------------------------------------
    def _start(self) -> None:
        self.was_ready = self.kept.lost = False
        self.kept.forget_answers()
        self._started = monotonic()
        self._due = {"restart": self._started + RESTART_DELAY_MAX}  # in case anything fails here
        fds = self._listening.fds() + self.kept.newest_first()
        environ = self._environ([name for name, _ in fds])
        # our handler must not swallow a signal in the child between fork and exec
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self.pid = os.fork()
            if self.pid == 0:
                signal.set_wakeup_fd(-1)
                become(self._options.command, environ, [fd for _, fd in fds], set(map(int, mask)))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._due = {"start": self._started + self._options.start_timeout}

    def _environ(self, names: list[str]) -> dict[str, str]:
        environ = os.environ | {
            "NOTIFY_SOCKET": self.mailbox.address, "FDSTORE": str(self.kept.limit), BARRIER_ANSWERS: "1",
            SEVERAL: str(_SEVERAL), SURE: str(PROMISED),
            "LISTEN_FDS": str(len(names)), "LISTEN_FDNAMES": ":".join(names),
        }
        if self._options.watchdog:
            environ["WATCHDOG_USEC"] = str(int(self._options.watchdog * 1e6))
        return environ

    def _ended(self, status: int) -> None:
        """The daemon is gone: end with it, or plan its next start. A negative status is a signal."""
        lived = monotonic() - self._started
        self.pid, self._due = 0, {}
        if self._ending:
            if status not in (0, -signal.SIGTERM, -signal.SIGINT):
                self._status = 128 - status if status < 0 else status  # as a shell passes it on
            return
        if not self._ever_ready and not len(self.kept) and status >= 0:
            log(f"the daemon ended with status {status} before it was ready")
            self._ending, self._status = True, status
            return
        delay = self.delay(lived)
        log(f"the daemon {_said(status)}, {len(self.kept)} fds held, next start in {delay:g} s")
        self._due = {"restart": monotonic() + delay}

    def delay(self, lived: float) -> float:
        """Seconds until the next start: 0 after steady service, longer after each failure."""
        if self.was_ready:
            self._failures = 0
            return 0.0 if lived >= STEADY else self._options.restart_delay
        self._failures += 1
        return min(self._options.restart_delay * 2.0 ** min(self._failures - 1, 16), RESTART_DELAY_MAX)

    def _signals(self, numbers: bytes) -> None:
        for number in dict.fromkeys(numbers):
            if number in _ENDING:
                self._end()
            elif number in _PASSED_ON and self.pid:
                self._kill(number)
        self._reap()

    def _reap(self) -> None:
        """Reap dead children; as pid 1 also those of other processes."""
        while True:
            try:
                dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if dead is None:
                return
            is_daemon = dead.si_pid == self.pid
            if is_daemon:
                kill_group(self.pid)  # while its pid cannot be reused
                while self.receive():  # all its last messages
                    pass
            _, status = os.waitpid(dead.si_pid, 0)
            if is_daemon:
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
    def _patience(self) -> float:
        """Milliseconds until something is due, at most an hour: poll(2) accepts no more."""
        return min(max(0.0, min(self._due.values()) - monotonic()), 3600.0) * 1000 + 1

    def _deadlines(self) -> None:
        now = monotonic()
        for what in [what for what, when in self._due.items() if when <= now]:
            self._due.pop(what, None)
            if what == "restart":
                self._start()
            elif what == "kill":
                log("the daemon does not end: killed")
                self._kill(signal.SIGKILL)
            else:
                limit = self._options.watchdog if what == "watchdog" else self._options.start_timeout
                log(f"{what} time-out of {limit:g} s: the daemon is aborted")
                self._kill(signal.SIGABRT)
                self._due = {"kill": monotonic() + self._options.abort_timeout}

    # -- messages --------------------------------------------------------------------------------------------
    def receive(self) -> bool:
        """Process the queued messages; True: there may be more."""
        return self.mailbox.receive(self._message)

    def _message(self, pid: int, data: bytes, fds: array[int], whole: bool) -> bool:
        """Act on one message of the daemon; fds that are kept are taken out of `fds`. True: mostly no other follows."""
        if pid == 0 or pid != self.pid:
            if data != b"BARRIER=1":
                log(f"a message from process {pid}, which is not the daemon, is ignored")
            return False
        kept = self.kept
        if data == b"BARRIER=1":
            kept.answer_once(fds)
            return False
        lines = data.split(b"\n")
        last = asks = lines[-1] == b"ANSWER=1"
        if asks:
            lines.pop()
        if not whole:
            kept.lost = True
        elif len(lines) == 2 and lines[1].startswith(b"FDNAMES="):
            last = True
            names = [valid_name(name) for name in lines[1][8:].split(b":")]
            if lines[0] == b"FDSTORE=1":
                kept.store(names, fds)
            elif lines[0] == b"FDSTOREREMOVE=1":
                kept.drop(names)
        else:
            self._act(fields_of(lines), fds)
        if asks:
            kept.answer()
        return last

    def _act(self, fields: dict[bytes, bytes], fds: array[int]) -> None:
        names = [valid_name(fields.get(b"FDNAME", b"stored"))]
        if fields.get(b"FDSTORE") == b"1":
            self.kept.store(names * len(fds), fds)
        elif fields.get(b"FDSTOREREMOVE") == b"1":
            self.kept.drop(names)
        elif fields.get(b"ANSWERS") in (b"1", b"2"):
            self.kept.answer_at(fds, promises=fields[b"ANSWERS"] == b"2")
        if fields.get(b"READY") == b"1":
            self.was_ready = self._ever_ready = True
            self._due.pop("start", None)
        fed = b"READY" in fields or b"WATCHDOG" in fields
        if fed and self._options.watchdog and self.was_ready and not self._ending and "kill" not in self._due:
            self._due["watchdog"] = monotonic() + self._options.watchdog


def run_keeper(argv: list[str]) -> int:
    """The keeper's main, argv without "--keeper"; 0: ended as asked, 1: not started; or the daemon's."""
    open_standard_streams()
    try:
        keeper = Keeper(parse(argv))
    except (OSError, ValueError, LookupError) as exc:
        say(f"gmemd --keeper: {exc}")
        return 1
    try:
        return keeper.run()
    finally:
        keeper.close()
        wait_logged()


def _said(status: int) -> str:
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"


if __name__ == "__main__":
    sys.exit(run_keeper(sys.argv[1:]))
