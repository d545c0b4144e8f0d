"""Starting a VMM from a person's command, with the descriptors of objects.

A process is created that waits for `go` before it becomes the command: whoever has to know its id, to end it if we die,
learns it before there is a VMM. If we end before `go`, it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

from gmemd.posix.sockets import split_unix, written
from gmemd.vmm.ending import VmmError, end
from gmemd.vmm.qemu import Qemu

_KEPT = 1 << 20  # bytes of what a VMM in the background says
_TAIL = 1 << 14  # bytes of what it said that are looked at
_QUOTED = 3  # lines of it that are quoted
_SOCKET = re.compile(r"(^unix:|[,:]path=)((?:[^,]|,,)+)")
CANNOT_RUN, NOT_FOUND = 126, 127  # as env(1), and every shell


class Arranged(NamedTuple):
    """A command with what it needs to be driven."""

    words: list[str]
    qmp: str  # the path of its QMP socket


def arrange(words: Sequence[str], qmp: str | None, otherwise: str, *, incoming: bool,
            taken: str = "") -> Arranged:
    """Complete a command of QEMU: with a QMP socket, and with `-incoming defer`, where it has none.

    Paths are absolute, here and in what is returned; the command may name them relative to our directory.
    `qmp`: the socket that was asked for; without it the one that the command names is used, or `otherwise`, also in
    place of `taken`, which another VMM has. VmmError: it cannot be completed.
    """
    found = [_moved(word, taken, qmp or otherwise) if taken else word for word in words]
    if incoming:
        if "-c" in found[1:2] and os.path.basename(found[0]).endswith("sh"):
            raise VmmError("the command is a shell's, which would not pass on '-incoming': write that of the VMM")
        given = _value(found, "incoming")
        if given is None:
            found += ["-incoming", "defer"]
        elif given != "defer":
            raise VmmError(f"the command has '-incoming {given}': leave it out, or write '-incoming defer'")
    named = _socket_of(found)
    if qmp is None and named is not None:
        return Arranged(found, named)
    if qmp is not None and any(qmp in word or qmp in _sockets(word) for word in found):
        return Arranged(found, qmp)
    path = qmp or otherwise
    return Arranged([*found, "-qmp", f"{written(path)},server=on,wait=off"], path)


def _sockets(word: str) -> list[str]:
    """The sockets that a word of a command names, as in -qmp unix:PATH or path=PATH."""
    return [_absolute(path) for _, path in _SOCKET.findall(word)]


def _moved(word: str, taken: str, path: str) -> str:
    """The word with another socket in place of one that is taken."""
    return _SOCKET.sub(lambda found: found[1] + path.replace(",", ",,") if _absolute(found[2]) == taken else found[0],
                       word)


def _absolute(written_path: str) -> str:
    return os.path.abspath(written_path.replace(",,", ","))


def _value(words: Sequence[str], option: str) -> str | None:
    for at, word in enumerate(words[:-1]):
        if word in (f"-{option}", f"--{option}"):
            return words[at + 1]
    return None


def _socket_of(words: Sequence[str]) -> str | None:
    """The socket that the command's -qmp listens on; None: it has none, or connects."""
    given = _value(words, "qmp")
    found = None if given is None else split_unix(given)
    if found is None or not {"server", "server=on"} & set(found[1]):
        return None
    return os.path.abspath(found[0])


def reach(started: Started, path: str, timeout: float) -> Qemu:
    """Connect to a VMM that we have started, as soon as it listens. VmmError: it ends, or does not listen in time."""
    deadline = time.monotonic() + timeout
    while True:
        if (status := started.poll()) is not None:
            raise VmmError(f"the command ended with status {status}: {started.words() or 'it said nothing'}")
        try:
            qemu = Qemu(path, timeout)
            break
        except VmmError as exc:
            if not isinstance(exc.__cause__, FileNotFoundError | ConnectionRefusedError | ConnectionResetError):
                raise
            if time.monotonic() > deadline:
                said = started.words()
                raise VmmError(f"{exc}, {timeout:g} s after the command was started{said and f': {said}'}") from exc
        time.sleep(0.005)
    if qemu.pid != started.pid:
        qemu.close()
        raise VmmError(f"the VMM at '{path}' is process {qemu.pid}, but the command is process {started.pid}: "
                       "start the VMM itself, without -daemonize and without a program that stays around it")
    return qemu


class Started:
    """A VMM that we have started; or a process that waits to become it, until `go`."""

    def __init__(self, words: Sequence[str], fds: Sequence[int] = (), *, foreground: bool = False) -> None:
        """`fds` are passed on under their numbers.

        In the background it has a session of its own, no input, and what it says at first is kept for `words`. In the
        foreground it shares our terminal, and what it says on standard error is passed on. VmmError: no process can be
        created.
        """
        self._status: int | None = None
        self._said = bytearray()
        self._relay: threading.Thread | None = None
        gate, self._go = os.pipe()
        source, sink = os.pipe() if foreground else (_output(), -1)
        output = sink if foreground else source
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            self.pid = os.fork()
        except OSError as exc:
            for fd in (gate, self._go, source, *([sink] if foreground else [])):
                os.close(fd)
            raise VmmError(f"cannot start the command: {exc.strerror}") from exc
        if self.pid == 0:
            _become(list(words), fds, gate, self._go, output, foreground=foreground)
        os.close(gate)
        self._source = source
        if foreground:
            os.close(sink)
            self._relay = threading.Thread(target=self._pass_on, daemon=True)
            self._relay.start()

    def go(self) -> None:
        """Let it become the command."""
        if self._go >= 0:
            with contextlib.suppress(BrokenPipeError):
                os.write(self._go, b"\n")
            self._forgo()

    def _forgo(self) -> None:
        if self._go >= 0:
            os.close(self._go)
            self._go = -1

    def poll(self) -> int | None:
        """Its exit status as a shell has it, None while it runs."""
        return self._reap(os.WNOHANG)

    def wait(self) -> int:
        """Wait until it has ended; its exit status."""
        status = self._reap(0)
        assert status is not None
        return status

    def kill(self) -> None:
        """End it, and wait until it has."""
        self._forgo()
        if self._status is None:
            end(self.pid)
            self.wait()

    def words(self) -> str:
        """The last lines that it said, as one; "" if none."""
        if self._relay is None:
            size = os.lseek(self._source, 0, os.SEEK_CUR)  # where the VMM is, which has the same open file
            said = os.pread(self._source, min(size, _TAIL), max(size - _TAIL, 0))
        else:
            if self._status is not None:
                self._relay.join(1)
            said = bytes(self._said)
        lines = [line.strip() for line in said.decode(errors="replace").splitlines() if line.strip()]
        return "; ".join(dict.fromkeys(line.partition(": ")[2] if line.startswith("qemu-") and ": " in line else line
                                       for line in lines[-_QUOTED:]))

    def _reap(self, options: int) -> int | None:
        if self._status is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                self._status = code if code >= 0 else 128 - code
                self._forgo()
        return self._status

    def _pass_on(self) -> None:
        with contextlib.suppress(OSError), os.fdopen(self._source, "rb", 0) as source:
            while part := source.read(1 << 16):
                self._said += part
                del self._said[:-_TAIL]
                sys.stderr.buffer.write(part)
                sys.stderr.flush()


def _output() -> int:
    """A file for what a VMM in the background says, as long as it lives: what no longer fits is refused (EPERM)."""
    fd = os.memfd_create("output", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, _KEPT)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd


class Guard:
    """A process that kills others if this one is killed before `end`: they would hold memory, and run nothing."""

    def __init__(self, pids: Sequence[int]) -> None:
        reader, self._writer = os.pipe()
        try:
            self._pid = os.fork()
            if self._pid == 0:
                try:
                    os.close(self._writer)
                    os.setsid()  # what ends us from the terminal does not end it
                    if not os.read(reader, 1):
                        for pid in pids:
                            with contextlib.suppress(ProcessLookupError):
                                os.kill(pid, signal.SIGKILL)
                finally:
                    os._exit(0)
        except OSError as exc:
            os.close(self._writer)
            raise VmmError(f"cannot start a process that guards the VMM: {exc.strerror}") from exc
        finally:
            os.close(reader)

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def end(self) -> None:
        """From here on they are on their own."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._writer, b"\n")
        os.close(self._writer)
        os.waitpid(self._pid, 0)


def _become(words: list[str], fds: Sequence[int], gate: int, go: int, output: int, *, foreground: bool) -> NoReturn:
    """In the new process: wait for the word, then run the command."""
    status = CANNOT_RUN
    try:
        os.close(go)
        if not foreground:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(output, 1)
        if os.read(gate, 1):
            os.dup2(output, 2)
            for fd in fds:
                os.set_inheritable(fd, True)
            for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores these, and execve keeps that
                signal.signal(number, signal.SIG_DFL)
            try:
                os.execvp(words[0], words)
            except (OSError, ValueError) as exc:
                os.write(2, f"{words[0]}: {getattr(exc, 'strerror', None) or exc}\n".encode())
                status = NOT_FOUND if isinstance(exc, FileNotFoundError | NotADirectoryError) else CANNOT_RUN
    finally:
        os._exit(status)
