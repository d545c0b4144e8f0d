"""`gmemctl exec`: run a command in our place, with the descriptors of objects.

The command inherits one descriptor for each object and finds it through its words: {ID} becomes /proc/self/fd/N,
{ID.fd} becomes N, {ID.size} the bytes and {ID.offset} where in the file they begin, which is 0 except for parts of
files. "ID=N" requests a certain N. The process is replaced, so signals, standard streams and the exit status are the
command's.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from argparse import Namespace
from collections.abc import Container, Mapping
from typing import Any

from gmemd.cli.call_syntax import UsageError
from gmemd.cli.chosen import choose
from gmemd.cli.connection import Connection, note
from gmemd.cli.parser import ALL, COMMAND, Verbs, argument

# as env(1), and every shell
CANNOT_RUN, NOT_FOUND = 126, 127

VERBS = Verbs()


@VERBS.add(
    "run a command in our place, with objects' descriptors",
    argument("id", metavar="ID[=N]", nargs="*", completes="ids",
             help="in COMMAND {ID} becomes /proc/self/fd/N, {ID.fd} N, {ID.size} the bytes, {ID.offset} "
                  "where they begin; or a pattern"),
    ALL, argument("--runner", action="store_true",
                  help="the command runs a guest on the objects: no other may until it has ended"), COMMAND,
    examples=("exec ram0 -- head -c 5 {ram0}", "exec ram0=9 -- sh -c 'ls -l /proc/self/fd/9'"))
def exec_(connection: Connection, options: Namespace) -> int:
    """Replace this process by the command; return only if that fails."""
    if not options.exec_command:
        raise UsageError("exec needs a command: gmemctl exec ID -- COMMAND")
    wanted = dict(map(_wanted, options.id))
    if len(wanted) < len(options.id):
        raise UsageError("exec: an object is named twice")
    ids, unmatched = choose(connection, options, connection.memory)
    if unmatched:
        raise unmatched[0]
    wanted = {name: wanted.get(name) for name, _ in map(_wanted, ids)}
    numbers = [number for number in wanted.values() if number is not None]
    if len(set(numbers)) < len(numbers):
        raise UsageError("exec: two objects cannot have one descriptor number")
    values: dict[str, Any] = {}
    fds: dict[str, int] = {}
    for name in wanted:
        values[name], [fds[name]] = connection.execute_fds("memdev-get-fd", {"id": name})
        if options.runner:
            connection.execute("memdev-set-runner", {"id": name})
    connection.client.close()
    places = place(fds, wanted)
    text = " ".join(options.exec_command)
    for name, value in values.items():
        if value.get("offset") and f"{{{name}.offset}}" not in text:
            note(f"'{name}' begins at byte {value['offset']} of its file: pass the command {{{name}.offset}}")
    return replace_process([fill_in(word, placeholders(values, places)) for word in options.exec_command])


def _wanted(text: str) -> tuple[str, int | None]:
    name, equals, number = text.partition("=")
    if not equals:
        return name, None
    if not (number.isascii() and number.isdigit()):
        raise UsageError(f"exec: '{text}' is not of the form ID or ID=N")
    return name, int(number)


def place(fds: Mapping[str, int], wanted: Mapping[str, int | None]) -> dict[str, int]:
    """Make the fds inheritable, under the requested numbers if any; return where each is now.

    The given fds are used up. What was open under a requested number is closed, as by a shell's N<FILE.
    """
    taken = {number for number in wanted.values() if number is not None}
    places: dict[str, int] = {}
    clear = {name: _away_from(taken, fd) for name, fd in fds.items()}
    for name, fd in clear.items():
        number = wanted[name]
        if number is None:
            os.set_inheritable(fd, True)
            places[name] = fd
            continue
        try:
            places[name] = os.dup2(fd, number, inheritable=True)
        except (OSError, OverflowError) as error:
            raise UsageError(f"exec: '{name}={number}': {getattr(error, 'strerror', error)}") from None
        os.close(fd)
    return places


def _away_from(taken: Container[int], fd: int) -> int:
    """Return the fd, or a duplicate instead, under a number that is not requested."""
    passed = []
    while fd in taken:
        passed.append(fd)
        fd = os.dup(fd)
    for old in passed:
        os.close(old)
    return fd


def placeholders(values: Mapping[str, Mapping[str, Any]], places: Mapping[str, int]) -> dict[str, str]:
    """Return the replacements for "{...}" in the command's words; an object's id comes before a suffix."""
    found: dict[str, Any] = {}
    for name, fd in places.items():
        offset = values[name].get("offset", 0)  # an older daemon does not report it
        found |= {f"{name}.fd": fd, f"{name}.size": values[name]["size"], f"{name}.offset": offset}
    return {name: str(value) for name, value in found.items()} | {
        name: f"/proc/self/fd/{fd}" for name, fd in places.items()}


def fill_in(word: str, found: Mapping[str, str]) -> str:
    """Replace each {NAME} that is known; every other brace stays (JSON, shell, awk)."""
    return re.sub(r"\{([^{}]*)\}", lambda match: found.get(match[1], match[0]), word)


def replace_process(words: list[str]) -> int:
    """Become the command; return the exit status if that fails."""
    sys.stdout.flush()
    sys.stderr.flush()
    # Python ignores these, and an ignored signal stays ignored across execve
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(words[0], words)
    except (FileNotFoundError, NotADirectoryError) as error:
        note(f"{words[0]}: {error.strerror}")
        return NOT_FOUND
    except (OSError, ValueError) as error:
        note(f"{words[0]}: {getattr(error, 'strerror', None) or error}")
        return CANNOT_RUN
