"""gmemctl: the command-line tool.

Exit status: 0 done; 1 the server refused, or something failed here; 2 wrong command line, nothing was sent; 3 no
connection, or it was lost; 4 no answer in time (--timeout); 130 interrupted. `exec` and `run` have the exit status of
their command; 125 when gmemctl failed before, 126 when the command could not be run, 127 when it was not found.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

from gmemd.cli.call_syntax import UsageError
from gmemd.cli.connection import Connection
from gmemd.cli.parser import make_parser, parse
from gmemd.cli.verbs import (
    apply,
    attach,
    capture,
    checkpoints,
    clones,
    fork,
    handover,
    jobs,
    local,
    memory,
    moving,
    nodes,
    objects,
    quota,
    replace,
    rights,
    rooms,
    server,
    shell,
    snapshots,
)
from gmemd.errors import QmpError
from gmemd.posix.sockets import path_of
from gmemd.posix.streams import open_standard_streams

if TYPE_CHECKING:
    from gmemd.client.client import Client

DONE, FAILED, USAGE, NO_CONNECTION, TOO_LATE, EXEC_FAILED, INTERRUPTED = 0, 1, 2, 3, 4, 125, 130
IN_OUR_PLACE = ("exec", "run", "rollback")  # verbs with the exit status of their command

SYSTEM_SOCKET = "/run/gmemd/qmp.sock"
_GREETING = 10.0  # seconds; a server greets at once, but not a QEMU that has another client

VERBS = {
    **objects.VERBS,
    **apply.VERBS,
    **handover.VERBS,
    **replace.VERBS,
    **rights.VERBS,
    **quota.VERBS,
    **rooms.VERBS,
    **capture.VERBS,
    **attach.VERBS,
    **checkpoints.VERBS,
    **memory.VERBS,
    **moving.VERBS,
    **snapshots.VERBS,
    **clones.VERBS,
    **fork.VERBS,
    **jobs.VERBS,
    **server.VERBS,
    **nodes.VERBS,
    **shell.VERBS,
    **local.VERBS,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; return the exit status."""
    open_standard_streams()
    # a name from outside may hold characters that the terminal's encoding lacks
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    options = parse(make_parser(VERBS), list(sys.argv[1:] if argv is None else argv))
    status = run(options)
    if options.verb in IN_OUR_PLACE and status in (FAILED, NO_CONNECTION, TOO_LATE):
        return EXEC_FAILED
    return status


def run(options: argparse.Namespace) -> int:
    """Carry out the verb, and report errors; return the exit status."""
    try:
        _check_fds(getattr(options, "fd", ()))
        with closing(Connection(partial(connect, options), VERBS, output=options.output,
                                dry_run=getattr(options, "dry_run", False))) as connection:
            try:
                status = VERBS[options.verb].function(connection, options)
            except QmpError as error:
                connection.explain(error)
                return FAILED
        sys.stdout.flush()
        return status
    except UsageError as error:
        return _fail(str(error), USAGE)
    except TimeoutError:
        return _fail("no answer in time", TOO_LATE)
    except BrokenPipeError:  # the reader of our output has gone; exit would complain again
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return FAILED
    except OSError as error:
        said = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return _fail(said, NO_CONNECTION if isinstance(error, ConnectionError) else FAILED)
    except KeyboardInterrupt:
        return INTERRUPTED


def _check_fds(fds: Sequence[int]) -> None:
    """Raise UsageError for an --fd that is not open; call it before anything is opened here."""
    for fd in fds:
        try:
            os.fstat(fd)
        except (OSError, OverflowError):
            raise UsageError(f"--fd {fd}: not an open descriptor; the shell opens one by {fd}<FILE") from None


def _fail(text: str, status: int) -> int:
    print(f"gmemctl: {text}", file=sys.stderr)
    return status


# -- the connection


def connect(options: argparse.Namespace) -> Client:
    """Return a negotiated connection to the server that the options name; ConnectionError."""
    from gmemd.client.client import Client

    path = socket_path(options.socket, os.environ, os.getuid())
    limit = _GREETING if options.timeout is None else options.timeout
    try:
        client = Client(path, timeout=limit, wait=options.wait)
    except QmpError as error:  # it serves nobody just now, or not this client
        hint = "the server's log says why"
        raise ConnectionError(f"{path}: {error.desc}\n  hint: {hint}") from None
    except TimeoutError:
        hint = "is the server stopped or busy, or does another client occupy it?"
        raise ConnectionError(f"{path}: no greeting in {limit:g} s\n  hint: {hint}") from None
    except OSError as error:
        reason = error.strerror or str(error)
        hint = "is gmemd running there? --socket or GMEMD_SOCKET names another socket"
        raise ConnectionError(f"cannot connect to {path}: {reason}\n  hint: {hint}") from None
    client.timeout = options.timeout
    return client


def socket_path(given: str | None, environment: Mapping[str, str], uid: int) -> str:
    """Return the socket: --socket, GMEMD_SOCKET, then where gmemd listens by default."""
    path = given or environment.get("GMEMD_SOCKET")
    if path:
        return path_of(path)
    if uid == 0 or os.path.exists(SYSTEM_SOCKET):
        return SYSTEM_SOCKET
    return os.path.join(environment.get("XDG_RUNTIME_DIR") or f"/run/user/{uid}", "gmemd", "qmp.sock")


if __name__ == "__main__":
    sys.exit(main())
