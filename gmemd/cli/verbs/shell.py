"""`gmemctl shell`: one line after another, on a terminal with history and completion, or from a script.

A line is a verb of gmemctl (ls, show m0), a command of the server in call syntax (object-del id=m0), or raw QMP, which
may span several lines.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from gmemd.cli.call_syntax import UsageError
from gmemd.cli.connection import DONE, REFUSED, Connection, note
from gmemd.cli.parser import Verbs, first_words, parse, takes_command
from gmemd.cli.verbs.server import call, print_event, qmp
from gmemd.errors import QmpError

VERBS = Verbs()
HELP = """\
VERB ...               a verb of gmemctl; 'help VERB' says more: {verbs}
COMMAND key=value ...  a command of the server; 'COMMAND help' lists the keys, 'call' all commands
{{"execute": ...}}       raw QMP, over several lines if needed
exit (or Ctrl-D)       leave; the server's own 'quit' ends the server and must be written 'call quit'
"""


@VERBS.add("read commands from a terminal or a script", examples=("shell",))
def shell(connection: Connection, options: Namespace) -> int:
    """Run lines until the end of the input; the status of the last one that failed, else 0."""
    status = DONE
    with _reader(connection) as read:
        while True:
            for event in connection.client.take_events():
                print_event(connection, event)
            try:
                line = read("gmemctl> ")
                if line.split()[:1] == ["exit"]:
                    break
                status = run_line(connection, options, line, read) or status
            except EOFError:
                break
            except KeyboardInterrupt:
                print(file=sys.stderr)
    return status


def run_line(connection: Connection, options: Namespace, line: str, read: Callable[[str], str]) -> int:
    """Run one line (a raw message takes more from `read`); return its status."""
    try:
        return _run(connection, options, line, read)
    except QmpError as error:
        connection.explain(error)
    except (UsageError, ValueError) as error:
        note(str(error))
    except TimeoutError:
        note("no answer in time")
    except SystemExit:  # argparse has reported what is wrong
        pass
    return REFUSED


def _run(connection: Connection, options: Namespace, line: str, read: Callable[[str], str]) -> int:
    if line.lstrip().startswith("{"):
        return qmp(connection, Namespace(text=_whole(line, read), fd=[]))
    import shlex

    words = shlex.split(line, comments=True)
    if not words:
        return DONE
    if words == ["help"]:
        print(HELP.format(verbs=" ".join(first_words(connection.verbs))), end="")
        return DONE
    if words == ["quit"]:
        raise UsageError("'quit' would end the server: 'call quit' does that, 'exit' leaves this shell")
    if words[0] == "shell" or words[0] in takes_command(connection.parser):
        return _run_child(options, words)
    if words[0] not in first_words(connection.verbs):
        return call(connection, Namespace(command=words[0], words=words[1:], fd=[]))
    return _run_verb(connection, words)


def _run_verb(connection: Connection, words: list[str]) -> int:
    preset = Namespace(output=connection.output, timeout=connection.client.timeout)
    given = parse(connection.parser, words, preset)
    if given.socket is not None:
        raise UsageError("the shell stays with its server; leave it to use --socket")
    with connection.lent(given):
        return connection.verbs[given.verb].function(connection, given)


def _run_child(options: Namespace, words: list[str]) -> int:
    """A verb that runs a command has its terminal, or even its process: run it in another one."""
    import subprocess

    given = {"--socket": options.socket, "--timeout": options.timeout, "--wait": options.wait, "-o": options.output}
    common = [word for flag, value in given.items() if value is not None for word in (flag, str(value))]
    return subprocess.call([sys.executable, "-m", "gmemd.cli.gmemctl", *common, *words])


def _whole(line: str, read: Callable[[str], str]) -> str:
    from gmemd.cli.rawqmp import whole_messages

    while whole_messages(line.encode("utf-8", "surrogateescape") + b" ") is None:
        line += "\n" + read("...> ")
    return line


# -- reading lines


@contextmanager
def _reader(connection: Connection) -> Iterator[Callable[[str], str]]:
    """Yield the function that reads a line, given a prompt; EOFError at the end."""
    if not sys.stdin.isatty():
        yield lambda prompt: input()
        return
    import readline

    from gmemd.cli.tab import Completion

    completion = Completion(connection)
    readline.set_completer_delims(" \t\n")
    readline.set_completer(
        lambda text, state: completion.candidate(readline.get_line_buffer()[: readline.get_endidx()], state)
    )
    readline.parse_and_bind("tab: complete")
    path = history_path()
    with suppress(OSError):  # none yet
        readline.read_history_file(path)
    try:
        yield input
    finally:
        readline.set_history_length(1000)
        try:
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            readline.write_history_file(path)  # mode 0600
        except OSError as error:
            note(f"the history was not saved: {error}")


def history_path() -> str:
    """Return the path of the history, below $XDG_STATE_HOME."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.join(state, "gmemd", "gmemctl-history")
