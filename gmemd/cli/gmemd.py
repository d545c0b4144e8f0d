"""gmemd: the daemon's command line."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

from gmemd import __version__
from gmemd.errors import QmpError, os_errors
from gmemd.posix.sockets import split_unix
from gmemd.posix.streams import open_standard_streams, say

TYPE_CHECKING = False  # typing and argparse are not imported for the keeper, which should be small
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from gmemd.web.address import Address

DEFAULT_SOCKET = "qmp.sock"


def runtime_directory() -> str:
    """The default directory of socket and state: systemd's, /run/gmemd as root, else below $XDG_RUNTIME_DIR."""
    given = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    if given:
        return given
    if os.getuid() == 0:
        return "/run/gmemd"
    base = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
    return os.path.join(base, "gmemd")


# The options, as argparse's add_argument takes them.
_OPTIONS: dict[str, dict[str, Any]] = {
    "--qmp": {"action": "append", "metavar": "unix:PATH[,pretty=on]",
              "help": "listen for QMP there (repeatable); a comma in PATH is doubled"},
    "--object": {"action": "append", "metavar": "SPEC", "default": [],
                 "help": "create an object at start, as QEMU's -object; 'help' lists types, 'TYPE,help' properties"},
    "--kernel": {"default": "auto", "metavar": "auto|kvm|simulated[:PROFILE]", "help": "what provides guest_memfd"},
    "--state-dir": {"metavar": "DIR", "help": "where the registry lives (default: the runtime directory)"},
    "--snapshots": {"metavar": "DIR", "help": "where snapshots are kept (default: /var/lib/gmemd/snapshots as root,"
                    " else below $XDG_STATE_HOME; below systemd's state directory if there is one)"},
    "--persist": {"choices": ("auto", "on", "off"), "default": "auto", "help": "keep objects across restarts"},
    "--name": {"help": "the name that query-name answers"},
    "--uuid": {"help": "the UUID that query-uuid answers"},
    "--http": {"default": "off", "metavar": "off|unix:PATH|tcp:127.0.0.1:PORT",
               "help": "serve a status page, metrics and a JSON API there, read-only"},
    "--lab": {"action": "store_true", "help": "offer the fault lab: x-memdev-inject and related commands"},
    "--compat": {"metavar": "unstable-input=accept|reject", "help": "policy for unstable members and commands"},
    "--audit": {"metavar": "FILE|-", "default": "", "help": "append a JSON line for each change there, reopened on"
                " SIGHUP; -: standard error, or the journal"},
    "--policy": {"metavar": "FILE", "default": "",
                 "help": "who may do what, and how much (TOML, read again on SIGHUP); without it root, gmemd's own user"
                 " and the group of its socket may do everything"},
    "--check-policy": {"action": "store_true", "help": "say whether that file is right, and exit"},
    "--warm": {"choices": ("on", "off"), "default": "on", "help": "load what rare commands need right after the"
               " start, not at its first use: a few MiB"},
    "--log-level": {"default": "info", "choices": ("debug", "info", "warning", "error"), "help": "lowest level to log"},
    "--version": {"action": "store_true", "help": "print the version, and whether gmemd is compiled, and exit"},
}


def make_parser() -> argparse.ArgumentParser:
    import argparse

    parser = argparse.ArgumentParser(prog="gmemd", description="Own guest memory and speak QMP.",
                                     epilog="'gmemd demo' shows what it is for.",
                                     allow_abbrev=False, add_help=False)
    # To a group, because a parser would look up the terminal's size for each, importing shutil (5 ms in total).
    add = parser.add_argument_group("options").add_argument
    add("-h", "--help", action="help", help="show this help message and exit")
    for name, option in _OPTIONS.items():
        add(name, **option)
    return parser


def plain_options(arguments: Sequence[str]) -> SimpleNamespace | None:
    """The options of a command line that is right; None: argparse, whose import takes 6 ms, decides and explains."""
    found = {name: option.get("default", False if option.get("action") == "store_true" else None)
             for name, option in _OPTIONS.items()}
    words = iter(arguments)
    for word in words:
        name, given, value = word.partition("=")
        option = _OPTIONS.get(name)
        if option is None:
            return None
        action = option.get("action", "store")
        if action == "store_true":
            if given:
                return None
            found[name] = True
            continue
        if not given:
            value = next(words, "-")
            if value.startswith("-"):
                return None
        if value not in option.get("choices", (value,)):
            return None
        found[name] = [*(found[name] or ()), value] if action == "append" else value
    return SimpleNamespace(**{name.lstrip("-").replace("-", "_"): value for name, value in found.items()})


def parse_qmp(text: str) -> tuple[str, bool]:
    """unix:PATH[,pretty=on|off], and QEMU's server/wait options, which are the default here: path and pretty."""
    written = split_unix(text)
    if written is None:
        raise QmpError(f"'{text}' is not of the form unix:PATH[,pretty=on]")
    path, options = written
    pretty = False
    for option in filter(None, options):
        name, _, value = option.partition("=")
        if name == "pretty" and value in ("on", "off", ""):
            pretty = value != "off"
        elif (name, value) not in (("server", "on"), ("server", ""), ("wait", "off"), ("nowait", "")):
            raise QmpError(f"'{option}' is not an option of --qmp (a comma in a path is doubled)")
    return path, pretty


def main(argv: Sequence[str] | None = None) -> int:
    """Run the daemon; the exit status: 0 after a clean end, 1 when it cannot start, 2 for a wrong command line."""
    open_standard_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["schema"]:
        from gmemd.qapi.compile import main as schema_main

        return schema_main(arguments[1:])
    if arguments[:1] == ["demo"]:
        from gmemd.demo.story import main as demo_main

        return demo_main(arguments[1:])
    try:
        if "--keeper" in arguments:
            from gmemd.keeper.keeper import run_keeper

            return run_keeper(keeper_arguments(arguments))
        gc.disable()  # until the daemon serves: imports produce no garbage
        return _run(plain_options(arguments) or make_parser().parse_args(arguments))
    except QmpError as exc:
        say(f"gmemd: {exc.desc}")
        return 1
    except BrokenPipeError:  # of "gmemd --object help | head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(options: argparse.Namespace | SimpleNamespace) -> int:
    if options.version:
        print(f"gmemd {__version__} ({built()})")
        return 0

    if options.check_policy:
        return _check_policy(options)

    from gmemd.server.later import little_typing  # before anything imports asyncio

    with little_typing():
        from gmemd.daemon import Daemon, Options, QmpSocket
        from gmemd.observe.log import configure_log
        from gmemd.server.loop import run

    objects: tuple[dict[str, object], ...] = ()
    if options.object:
        from gmemd.schema.help import object_help
        from gmemd.schema.keyval import parse_object

        for spec in options.object:
            text = object_help(spec)
            if text is not None:
                print(text)
                return 0
        objects = tuple(map(parse_object, options.object))

    configure_log(options.log_level)

    if options.qmp:
        sockets = tuple(QmpSocket(*parse_qmp(text)) for text in options.qmp)
    else:
        sockets = (QmpSocket(default_socket(), default=True),)
    directory = options.state_dir or os.path.dirname(os.path.abspath(sockets[0].path))
    run(Daemon(Options(
        qmp=sockets, objects=objects, kernel=options.kernel,
        state_dir=directory, persist=options.persist, name=options.name,
        uuid=None if options.uuid is None else _uuid(options.uuid), unstable_input=_unstable_input(options.compat),
        lab=options.lab, http=_http(options.http), audit=options.audit,
        snapshots=os.path.abspath(options.snapshots or default_snapshots(os.environ, os.getuid())),
        policy=options.policy and os.path.abspath(options.policy), warm=options.warm == "on",
    )).run())
    return 0


def built() -> str:
    """Which build of gmemd this is (setup.py)."""
    from gmemd.qmp import lexer

    return "pure Python" if str(lexer.__file__).endswith(".py") else "compiled"


def _check_policy(options: argparse.Namespace | SimpleNamespace) -> int:
    if not options.policy:
        raise QmpError("--check-policy needs --policy FILE")
    from gmemd.authority.reading import read_policy
    from gmemd.schema.validate import Schema

    rules = read_policy(options.policy, Schema.load(lab=options.lab)).rules
    print(f"{options.policy}: {len(rules)} rules")
    for rule in rules:
        print(f"{rule.rights.rule}: {rule.rights.role.word}, {len(rule.rights.commands or ())} commands")
    return 0


def default_socket() -> str:
    """The path of the default socket, whose directory exists."""
    directory = runtime_directory()
    with os_errors(f"cannot create the runtime directory {directory}; choose another path with --qmp"):
        os.makedirs(directory, mode=0o750, exist_ok=True)
    return os.path.join(directory, DEFAULT_SOCKET)


def default_snapshots(environ: Mapping[str, str], uid: int) -> str:
    """The default directory of snapshots; it need not exist."""
    state = environ.get("STATE_DIRECTORY", "").partition(":")[0]
    if state:
        return os.path.join(state, "snapshots")
    if uid == 0:
        return "/var/lib/gmemd/snapshots"
    state = environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.join(state, "gmemd", "snapshots")


def keeper_arguments(arguments: Sequence[str]) -> list[str]:
    """The keeper's command line: its own options, a --listen for each --qmp, then the daemon's."""
    rest = [word for word in arguments if word != "--keeper"]
    if "--listen" in rest or "--exec" in rest:
        return rest
    asked = [value for word, value in zip(rest, [*rest[1:], ""], strict=True) if word == "--qmp"]
    asked += [word.removeprefix("--qmp=") for word in rest if word.startswith("--qmp=")]
    paths = [parse_qmp(text)[0] for text in asked] or [default_socket()]
    return [word for path in paths for word in ("--listen", f"qmp={os.path.abspath(path)}")] + rest


def _uuid(text: str) -> str:
    from uuid import UUID

    try:
        return str(UUID(text))
    except ValueError as exc:
        raise QmpError(f"'{text}' is not a UUID") from exc


def _unstable_input(compat: str | None) -> str:
    if compat is None:
        return "accept"
    name, _, value = compat.partition("=")
    if name != "unstable-input" or value not in ("accept", "reject"):
        raise QmpError(f"--compat takes unstable-input=accept|reject, not '{compat}'")
    return value


def _http(text: str) -> Address | None:
    if text == "off":
        return None
    from gmemd.web.address import parse_http

    return parse_http(text)


if __name__ == "__main__":
    sys.exit(main())
