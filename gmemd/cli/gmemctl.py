"""gmemctl: the command line for people.

Exit status: 0 done; 1 the server refused, or something here failed; 2 wrong command line, nothing was sent;
3 no connection, or it was lost; 4 no answer in time (--timeout); 130 interrupted.
`exec` ends as its command does; with 125 when gmemctl failed before, 126 when the command could not be run,
127 when it was not found.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from gmemd.errors import QmpError
from gmemd.posix.sockets import path_of
from gmemd.posix.streams import open_standard_streams

if TYPE_CHECKING:
    from gmemd.cli.verbs import Connection
    from gmemd.client.client import Client

DONE, FAILED, USAGE, NO_CONNECTION, TOO_LATE, EXEC_FAILED, INTERRUPTED = 0, 1, 2, 3, 4, 125, 130

SYSTEM_SOCKET = "/run/gmemd/qmp.sock"
_GREETING = 10.0  # seconds; a server greets at once, but a QEMU that has another client does not
_COMPLETION = 2.0  # seconds; a person waits at a command line
_LONGEST = 1e9  # seconds; what the system's calls can take

Verb = Callable[["Connection", argparse.Namespace], int]


class NoConnectionError(Exception):
    """There is no server to talk to."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; return the exit status."""
    open_standard_streams()
    # a name from outside may hold what the terminal's encoding does not
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    options = parse(list(sys.argv[1:] if argv is None else argv))
    status = run(options)
    if options.verb == "exec" and status in (FAILED, NO_CONNECTION, TOO_LATE):
        return EXEC_FAILED
    return status


def run(options: argparse.Namespace) -> int:
    """Connect, do what the verb says, and tell of what went wrong; return the exit status."""
    from gmemd.cli.words import UsageError

    if options.verb == "doctor":
        from gmemd.cli.doctor import doctor

        return doctor(json=options.output == "json")
    if options.verb == "completion" and options.what in ("bash", "zsh", "fish"):
        from gmemd.cli.completions import completion

        print(completion(options.what), end="")
        return DONE
    if options.verb == "completion" and options.timeout is None:
        options.timeout = _COMPLETION
    try:
        _check_fds(getattr(options, "fd", ()))
        with connect(options) as client:
            status = _run_verb(client, options)
        sys.stdout.flush()
        return status
    except UsageError as error:
        return _fail(str(error), USAGE)
    except TimeoutError:
        return _fail("no answer in time", TOO_LATE)
    except (NoConnectionError, ConnectionResetError) as error:
        return _fail(str(error), NO_CONNECTION)
    except BrokenPipeError:  # whoever read our output has gone; exit would complain once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return FAILED
    except OSError as error:
        return _fail(str(error), NO_CONNECTION if isinstance(error, ConnectionError) else FAILED)
    except KeyboardInterrupt:
        return INTERRUPTED


def _run_verb(client: Client, options: argparse.Namespace) -> int:
    from gmemd.cli import verbs

    connection = verbs.Connection(client, json=options.output == "json", dry_run=getattr(options, "dry_run", False))
    try:
        return find_verb(options.verb)(connection, options)
    except QmpError as error:
        verbs.explain(connection, error)
        return FAILED


def find_verb(name: str) -> Verb:
    """Return the function of a verb."""
    if name == "exec":
        from gmemd.cli.handover import exec_

        return exec_
    if name == "shell":
        from gmemd.cli.shell import shell

        return shell
    from gmemd.cli import memory, verbs

    function = name.replace("-", "_")
    found: Verb = getattr(memory, function, None) or getattr(verbs, function)
    return found


def _check_fds(fds: Sequence[int]) -> None:
    """Raise UsageError for an --fd that is not open; to be asked before we open anything ourselves."""
    from gmemd.cli.words import UsageError

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
    """Return a negotiated connection to the server that the options name; NoConnectionError."""
    from gmemd.client.client import Client

    path = socket_path(options.socket, os.environ, os.getuid())
    limit = _GREETING if options.timeout is None else options.timeout
    try:
        client = Client(path, timeout=limit, wait=options.wait)
    except TimeoutError:
        hint = "is the server stopped or busy, or does another client hold the connection?"
        raise NoConnectionError(f"{path}: no greeting in {limit:g} s\n  hint: {hint}") from None
    except OSError as error:
        reason = error.strerror or str(error)
        hint = "is gmemd running there? --socket or GMEMD_SOCKET names another socket"
        raise NoConnectionError(f"cannot connect to {path}: {reason}\n  hint: {hint}") from None
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


# -- the command line


def parse(words: list[str], preset: argparse.Namespace | None = None) -> argparse.Namespace:
    """Return the options of a command line, `preset` the defaults; wrong ones: SystemExit, status 2."""
    parser = make_parser()
    if "--" in words and "exec" in words[: words.index("--")]:
        end = words.index("--")
        options = parser.parse_args(words[:end], preset)
        if options.verb == "exec":
            options.exec_command = words[end + 1 :]
            return options
    options, more = parser.parse_known_args(words, preset)
    # argparse takes positional words in one place only: call COMMAND --fd 3 key=value
    if more and (options.verb != "call" or any(word.startswith("-") for word in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        options.words = [*options.words, *more]
    return options


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="gmemctl",
        description="Drive gmemd, or any QMP server.",
        epilog="Exit status: 0 done, 1 refused, 2 wrong command line, 3 no connection, 4 no answer in time.",
        allow_abbrev=False,
        formatter_class=_formatter,
    )
    _add_common(parser, output="table", socket=None, timeout=None, wait=0.0)
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS, formatter_class=_formatter)
    _add_common(common, **dict.fromkeys(("output", "socket", "timeout", "wait"), argparse.SUPPRESS))
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, prog="gmemctl")
    for name, help_text, arguments in _VERBS:
        sub = verbs.add_parser(
            name,
            help=help_text,
            description=help_text,
            parents=[common],
            allow_abbrev=False,
            formatter_class=_formatter,
        )
        for flags, settings in arguments:
            sub.add_argument(*flags, **settings)
    return parser


def _formatter(prog: str) -> argparse.HelpFormatter:
    """With a width given, argparse need not import shutil, which it does for every argument, help or not."""
    try:
        width = os.get_terminal_size().columns - 2
    except OSError:
        width = 78
    return argparse.HelpFormatter(prog, width=max(width, 40))


def _seconds(text: str) -> float:
    """A time that can be waited."""
    with suppress(ValueError):
        if 0 <= (value := float(text)) <= _LONGEST:
            return value
    raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds")


def _add_common(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    add = parser.add_argument
    add(
        "-o",
        "--output",
        choices=("json", "table"),
        default=defaults["output"],
        help="for programs or people (default)",
    )
    add(
        "--socket",
        metavar="PATH",
        default=defaults["socket"],
        help="the server's socket (GMEMD_SOCKET), also as unix:PATH with commas doubled",
    )
    add(
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        default=defaults["timeout"],
        help="for connecting, and for each answer; default none",
    )
    add(
        "--wait",
        metavar="SECONDS",
        type=_seconds,
        default=defaults["wait"],
        help="for a server that is not up yet",
    )


_Argument = tuple[tuple[str, ...], dict[str, Any]]
_ID: _Argument = (("id",), {"metavar": "ID"})
_IDS: _Argument = (("id",), {"metavar": "ID", "nargs": "+"})
_FD: _Argument = (
    ("--fd",),
    {"type": int, "action": "append", "default": [], "metavar": "N", "help": "send our descriptor N with it"},
)
_DRY_RUN: _Argument = (("--dry-run",), {"action": "store_true", "help": "say what would happen; change nothing"})

_VERBS: tuple[tuple[str, str, tuple[_Argument, ...]], ...] = (
    ("ls", "list the objects", ()),
    ("show", "show an object and its properties", (_ID,)),
    (
        "create",
        "make objects",
        (
            (
                ("spec",),
                {
                    "metavar": "TYPE,id=ID,size=1G,...",
                    "nargs": "+",
                    "help": "as QEMU's -object; TYPE,help, JSON",
                },
            ),
            _DRY_RUN,
        ),
    ),
    ("rm", "remove objects", (_IDS, _DRY_RUN)),
    ("get-fd", "fetch an object's descriptor and show what it is", (_ID,)),
    (
        "exec",
        "run COMMAND here with objects' descriptors: exec ID... -- COMMAND {ID}",
        (
            (
                ("id",),
                {
                    "metavar": "ID[=N]",
                    "nargs": "+",
                    "help": "in COMMAND {ID} becomes /proc/self/fd/N, {ID.fd} N, {ID.size} the bytes, {ID.offset} "
                    "where they begin",
                },
            ),
            (("exec_command",), {"metavar": "-- COMMAND", "nargs": "?", "default": ()}),
        ),
    ),
    ("survive", "show what objects outlive, and what to change", ((("id",), {"metavar": "ID", "nargs": "?"}),)),
    ("who", "show which processes hold an object", (_ID,)),
    (
        "convert",
        "make a part of a guest_memfd private or shared",
        (
            _ID,
            (("to",), {"choices": ("private", "shared")}),
            (("--offset",), {"metavar": "SIZE", "default": "0", "help": "where it begins; default 0"}),
            (("--size",), {"metavar": "SIZE", "help": "default: to the end"}),
            (("--preserve",), {"action": "store_true", "help": "keep the content"}),
            _DRY_RUN,
        ),
    ),
    ("ranges", "list the private and shared parts of a guest_memfd", (_ID,)),
    ("verify", "read an object's memory in a job and show its digests", (_ID,)),
    (
        "jobs",
        "list jobs",
        (
            (("--cancel",), {"metavar": "JOB", "help": "cancel this one"}),
            (("--dismiss",), {"metavar": "JOB", "help": "forget this one, which has ended"}),
            (("-f", "--follow"), {"action": "store_true", "help": "show their progress until all have ended"}),
            _DRY_RUN,
        ),
    ),
    (
        "top",
        "show what objects occupy, again and again",
        (
            (("-d", "--delay"), {"type": _seconds, "default": 2.0, "metavar": "SECONDS"}),
            (("-n", "--count"), {"type": int, "metavar": "N", "help": "end after N times"}),
            (("--lines",), {"type": int, "default": 20, "metavar": "N", "help": "the first N objects"}),
        ),
    ),
    ("doctor", "check this host: kernel, KVM, huge pages, limits, systemd", ()),
    ("qmp", "send raw QMP and print the replies", ((("text",), {"metavar": "JSON", "nargs": "?"}), _FD)),
    (
        "call",
        "run any command of the server; without one, list them",
        (
            (("command",), {"metavar": "COMMAND", "nargs": "?"}),
            (("words",), {"metavar": "key=value", "nargs": "*", "help": "or JSON; 'help' lists the keys"}),
            _FD,
            _DRY_RUN,
        ),
    ),
    (
        "events",
        "print events as they come",
        (
            (("name",), {"metavar": "NAME", "nargs": "*", "help": "only these"}),
            (("-f", "--follow"), {"action": "store_true", "help": "until interrupted (the default)"}),
            (("-n", "--count"), {"type": int, "metavar": "N", "help": "end after N events"}),
            (
                ("--for",),
                {"type": _seconds, "metavar": "SECONDS", "dest": "seconds", "help": "end after that time"},
            ),
        ),
    ),
    ("shell", "read commands from a terminal or a script", ()),
    (
        "completion",
        "print a shell's completion script",
        (
            (
                ("what",),
                {
                    "choices": ("bash", "zsh", "fish", "ids", "commands", "jobs", "events"),
                    "help": "ids and so on: what it asks",
                },
            ),
        ),
    ),
)

VERBS = tuple(name for name, _, _ in _VERBS)

if __name__ == "__main__":
    sys.exit(main())
