"""What may come next on a command line: verbs, commands, argument names, values, ids; from introspection."""

from __future__ import annotations

from collections.abc import Sequence

from gmemd.cli.connection import Connection
from gmemd.cli.parser import first_words, inner_verbs, options_of, values_of, verbs_of, words_of
from gmemd.errors import QmpError

_PATIENCE = 2.0  # seconds; a person is waiting


class Completion:
    """Completion for one connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._found: list[str] = []

    def candidate(self, line: str, state: int) -> str | None:
        """Return candidate number `state` for the last word of the line, as readline requests them."""
        if state == 0:
            client = self._connection.client
            usual, client.timeout = client.timeout, min(client.timeout or _PATIENCE, _PATIENCE)
            try:
                self._found = self.candidates(line)
            except (QmpError, OSError):
                self._found = []
            finally:
                client.timeout = usual
        return self._found[state] if state < len(self._found) else None

    def candidates(self, line: str) -> list[str]:
        """Return all words that the last word of the line may become; with a blank after those that end there."""
        *before, word = line.split(" ")
        before = [other for other in before if other]
        is_option = bool(before) and (word.startswith("-") or before[-1].startswith("-"))
        if before[:1] == ["call"] and not is_option:
            before = before[1:]
            return self._of_command(before, word) if before else _starting(word, self._connection.names("commands"))
        if not before:
            return _starting(word, [*first_words(self._connection.verbs), "exit", *self._connection.names("commands")])
        inner = inner_verbs(before[0], self._connection.verbs)
        if inner and len(before) == 1:
            return _starting(word, inner)
        if inner:
            before = [" ".join(before[:2]), *before[2:]]
        if before[0] in self._connection.verbs:
            return _starting(word, self._of_verb(before, word))
        return self._of_command(before, word)

    def _of_command(self, before: list[str], word: str) -> list[str]:
        """Complete an argument of command before[0]: its name, or after "=" its value."""
        known = self._connection.introspection
        arguments = dict(other.split("=", 1) for other in before[1:] if "=" in other)
        members = known.members(before[0], arguments)
        name, equals, _ = word.partition("=")
        if not equals:
            fresh = [f"{member.name}=" for member in members if member.name not in arguments]
            return [candidate.rstrip() for candidate in _starting(word, fresh)]
        member = next((member for member in members if member.name == name), None)
        if member is None:
            return []
        values = known.values(member.type) or (["on", "off"] if member.type == "bool" else [])
        if name == "job-id" or (name == "id" and before[0].startswith("job-")):
            values = self._connection.names("jobs")
        elif name == "id" and before[0] != "object-add":
            values = self._connection.names("ids")
        elif name == "path":
            values = [f"/objects/{found}" for found in self._connection.names("ids")]
        return _starting(word, [f"{name}={value}" for value in values])

    def _of_verb(self, before: list[str], word: str) -> list[str]:
        """Complete an option of a verb, an option's value, or what the verb works on."""
        parser = verbs_of(self._connection.parser)[before[0]]
        options = {flag: action for action in options_of(parser) for flag in action.option_strings}
        if word.startswith("-"):
            return list(options)
        option = options.get(before[-1])
        takes = values_of(option) if option is not None and option.nargs != 0 else words_of(parser)
        return [name for known in takes
                for name in (self._connection.names(known[1:-1]) if known.startswith("<") else [known])]


def _starting(word: str, candidates: Sequence[str]) -> list[str]:
    return sorted(f"{candidate} " for candidate in set(candidates) if candidate.startswith(word))
