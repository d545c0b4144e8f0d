"""The command line: what a verb is, and the parser derived from the verbs.

A verb is declared with its function, including arguments and their completion, examples, and hints for refusals. Its
name may be two words ("snapshot save"): the first then groups it with others.
Parser, help, completion, manual and docs/gmemctl.md are derived from that.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from gmemd.posix.sockets import path_of

if TYPE_CHECKING:
    from gmemd.cli.hints import Hint

_LONGEST = 1e9  # seconds; the limit of the system calls
OUTPUTS = ("table", "wide", "name", "json", "yaml")

Function = Callable[[Any, argparse.Namespace], int]  # of a verb, given the Connection and what was parsed


class Argument(NamedTuple):
    """One argument of a verb, as argparse takes it."""

    flags: tuple[str, ...]
    settings: dict[str, Any]
    completes: str  # completed with this kind of Connection.names


def argument(*flags: str, completes: str = "", **settings: Any) -> Argument:
    return Argument(flags, settings, completes)


class Verb(NamedTuple):
    """A verb and everything that belongs to it."""

    function: Function
    help: str
    arguments: tuple[Argument, ...]
    examples: tuple[str, ...]  # without "gmemctl"
    hints: tuple[Hint, ...]


class Verbs(dict[str, Verb]):
    """Verbs by name, in the order of their declaration."""

    def add(self, help: str, *arguments: Argument, group: str = "", examples: tuple[str, ...] = (),
            hints: tuple[Hint, ...] = ()) -> Callable[[Function], Function]:
        """Declare the verb that the decorated function carries out and is named after; `group`: the word before it."""

        def declare(function: Function) -> Function:
            name = f"{group} {function.__name__.rstrip('_').replace('_', '-')}".lstrip()
            self[name] = Verb(function, help, arguments, examples, hints)
            return function

        return declare


def seconds(text: str) -> float:
    """A time to wait."""
    with suppress(ValueError):
        if 0 <= (value := float(text)) <= _LONGEST:
            return value
    raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds")


def socket_path(text: str) -> str:
    """The absolute path of a VMM's socket, also written as unix:PATH: the server has another working directory."""
    if not (path := path_of(text)):
        raise argparse.ArgumentTypeError("the path is empty")
    return os.path.abspath(path)


ALL = argument("--all", action="store_true", help="all objects")
IDS = (argument("id", metavar="ID", nargs="*", completes="ids", help="or a pattern with * ? [ ], quoted"), ALL)
YES = argument("-y", "--yes", action="store_true", help="do not ask if a pattern or --all selects the objects")
FD = argument("--fd", type=int, action="append", default=[], metavar="N", help="send our descriptor N with it")
COMMAND = argument("exec_command", metavar="-- COMMAND", nargs="?", default=())  # of words, () if there is none
FENCE = (
    argument("--via", choices=("auto", "idle", "qmp", "lease", "freeze", "write-protect", "unfenced"),
             help="how writers are kept away; default: the first that is possible, never unfenced"),
    argument("--qmp", metavar="PATH", type=socket_path, help="the QMP socket of the VMM, to stop the guest"),
    argument("--deadline", metavar="MS", type=int, help="milliseconds after which writers go on; it has then failed"))
DRY_RUN = argument("--dry-run", action="store_true", help="say what would happen; change nothing")

_COMMON = (  # before or after the verb, with their defaults
    (argument("-o", "--output", metavar="FORMAT", choices=OUTPUTS,
              help="table (default), wide (with more columns), name (only ids), json or yaml"), "table"),
    (argument("--socket", metavar="PATH",
              help="the server's socket (GMEMD_SOCKET), also as unix:PATH with commas doubled"), None),
    (argument("--timeout", metavar="SECONDS", type=seconds,
              help="limit for connecting, and for each answer; default none"), None),
    (argument("--wait", metavar="SECONDS", type=seconds, help="wait for a server that is not up yet"), 0.0),
)


def fence(options: argparse.Namespace) -> dict[str, Any] | None:
    """The argument that the options of FENCE mean; None: the server's default."""
    given = {"via": options.via, "qmp": options.qmp, "deadline": options.deadline}
    return {name: value for name, value in given.items() if value is not None} or None


def make_parser(verbs: Mapping[str, Verb]) -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="gmemctl", description="Control gmemd, or any QMP server.", allow_abbrev=False, formatter_class=_formatter,
        epilog="Exit status: 0 done, 1 refused, 2 wrong command line, 3 no connection, 4 no answer in time.")
    subs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, prog="gmemctl")
    groups = {"": subs}
    for name, verb in verbs.items():
        group, _, last = name.rpartition(" ")
        if group not in groups:
            text = ", ".join(inner_verbs(group, verbs))
            outer = subs.add_parser(group, help=text, description=text, allow_abbrev=False, formatter_class=_formatter)
            groups[group] = outer.add_subparsers(metavar="VERB", required=True, prog=f"gmemctl {group}")
        examples = "".join(f"\n  gmemctl {example}" for example in verb.examples)
        sub = groups[group].add_parser(last, help=verb.help, description=verb.help, allow_abbrev=False,
                                       formatter_class=_formatter,
                                       epilog=f"examples:{examples}" if examples else None)
        sub.set_defaults(verb=name)
        for given in verb.arguments:
            _add(sub, given)
        for common, _ in _COMMON:
            _add(sub, common, default=argparse.SUPPRESS)
    for common, default in _COMMON:
        _add(parser, common, default=default)
    return parser


def _add(parser: argparse.ArgumentParser, given: Argument, **more: Any) -> None:
    action = parser.add_argument(*given.flags, **given.settings, **more)
    vars(action)["completes"] = given.completes


def _formatter(prog: str) -> argparse.HelpFormatter:
    """With a width given, argparse does not import shutil, which it would do for every argument, help or not."""
    try:
        width = os.get_terminal_size().columns or 80  # a serial console says 0
    except OSError:
        width = 80
    return argparse.RawDescriptionHelpFormatter(prog, width=max(width - 2, 40))


def parse(parser: argparse.ArgumentParser, words: list[str],
          preset: argparse.Namespace | None = None) -> argparse.Namespace:
    """Return the options of a command line, with `preset` as defaults; SystemExit with status 2 if it is wrong."""
    end = words.index("--") if "--" in words and not takes_command(parser).isdisjoint(words) else len(words)
    options, more = parser.parse_known_args(words[:end], preset)
    if end < len(words) and options.verb not in takes_command(parser):
        options, more = parser.parse_known_args(words, preset)
    elif end < len(words):
        options.exec_command = words[end + 1 :]
    # argparse accepts positional words in one place only: call COMMAND --fd 3 key=value, rm m0 --dry-run m1
    many = [action.dest for action in verbs_of(parser)[options.verb]._actions
            if not action.option_strings and action.nargs in ("*", "+")]
    if more and (not many or any(word.startswith("-") for word in more)):
        verbs_of(parser)[options.verb].error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        setattr(options, many[0], [*getattr(options, many[0]), *more])
    return options


# -- the contents of a parser


def verbs_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of the verbs, by name; empty for a parser without verbs."""
    found: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                inner = verbs_of(sub)
                found |= {f"{name} {last}": one for last, one in inner.items()} if inner else {name: sub}
    return found


def first_words(verbs: Iterable[str]) -> list[str]:
    """What a command line may begin with: verbs, and the groups of the others, once each."""
    return list(dict.fromkeys(name.partition(" ")[0] for name in verbs))


def inner_verbs(group: str, verbs: Iterable[str]) -> list[str]:
    """The second words of a group's verbs; [] for a verb that is none."""
    return [name.partition(" ")[2] for name in verbs if name.startswith(f"{group} ")]


def takes_command(parser: argparse.ArgumentParser) -> set[str]:
    """The verbs that run what stands behind "--" (COMMAND)."""
    return {name for name, sub in verbs_of(parser).items()
            if any(action.dest == "exec_command" for action in sub._actions)}


def options_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The options of a parser, in the order of its help."""
    return [action for action in parser._actions if action.option_strings]


def usage_of(verb: str, parser: argparse.ArgumentParser) -> str:
    """A verb and its words, without options."""
    words = [verb]
    for action in parser._actions:
        if not action.option_strings:
            word = str(action.metavar) if action.metavar else "|".join(map(str, action.choices or [action.dest]))
            words.append({"?": f"[{word}]", "*": f"[{word}...]", "+": f"{word}..."}.get(str(action.nargs), word))
    return " ".join(words)


def words_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    """What may follow a verb: choices as they are, and the server's names in angle brackets, as <ids>."""
    for action in parser._actions:
        if not action.option_strings:
            yield from values_of(action)


def values_of(action: argparse.Action) -> Iterator[str]:
    """The same for one argument, or for the value of one option."""
    if action.choices:
        yield from map(str, action.choices)
    elif getattr(action, "completes", ""):
        yield f"<{vars(action)['completes']}>"
