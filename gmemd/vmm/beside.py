"""The supervisor of captured memory: a process beside the VMM, which is neither its parent nor its child.

The VMM takes the place of the process that was called, so its id, its signals and its exit status are as without a
supervisor. The supervisor is in a session of its own and is not ended by what ends the VMM, because calls that it does
not answer would fail; it ends when the last process with the filter has ended.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Collection

from gmemd.vmm.seccomp import Listener, install

_READY = b"r"
_NAME = "gmemctl-capture"  # as ps shows it; at most 15 characters


def supervise(program: bytes, serve: Callable[[Listener], None], run: Callable[[bool], int], *,
              keep: Collection[int]) -> int:
    """Have the calls that a filter names answered by `serve` in a supervisor, which has the descriptors `keep`, and
    `run` the VMM in our place; `run` is told whether no_new_privs is set.

    Returns in the supervisor at its end (0), and here if running failed (the status). OSError: nothing was run.
    """
    ours, theirs = socket.socketpair()
    first = os.getpid()
    child = os.fork()
    if child == 0:
        if _leave():
            os._exit(0)
        ours.close()
        _serve(theirs, first, serve, keep)
        return 0
    theirs.close()
    os.waitpid(child, 0)
    with ours:
        _wait_ready(ours)
        listener, no_new_privs = install(program)
        socket.send_fds(ours, [_READY], [listener])
        os.close(listener)  # a VMM that holds it would wait forever if the supervisor died
        _wait_ready(ours)
    return run(no_new_privs)


def _wait_ready(peer: socket.socket) -> None:
    if peer.recv(1) != _READY:
        raise OSError("the supervisor could not be started")


def _leave() -> bool:
    """Leave the session and the parent; True in the process between, which is to end."""
    try:
        os.setsid()
        return os.fork() != 0
    except OSError:
        return True


def _serve(peer: socket.socket, first: int, serve: Callable[[Listener], None], keep: Collection[int]) -> None:
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGTSTP):
        signal.signal(number, signal.SIG_IGN)
    _release({*keep, peer.fileno(), 2})
    os.chdir("/")
    with contextlib.suppress(OSError), open("/proc/self/comm", "w") as file:
        file.write(_NAME)
    peer.sendall(_READY)
    _, fds, _, _ = socket.recv_fds(peer, 1, 1)
    if not fds:  # it has not come to running anything
        return
    listener = Listener(fds[0])
    with contextlib.suppress(OSError):  # it has ended already
        listener.watch(os.pidfd_open(first), _be_silent)
    peer.sendall(_READY)
    peer.close()
    try:
        serve(listener)
    finally:
        listener.close()


def _release(keep: Collection[int]) -> None:
    """Close what the VMM's parent has given the VMM, and what was ours before."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd > 2 and fd not in keep:
            with contextlib.suppress(OSError):
                os.close(fd)


def _be_silent() -> None:
    """Release standard error: a VMM that goes on in the background has released its own."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 2)
    os.close(null)
