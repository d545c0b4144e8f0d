"""What may come next on a command line: verbs, commands, argument names, values, ids; from introspection."""

from __future__ import annotations

from collections.abc import Sequence

from gmemd.cli.verbs import Connection
from gmemd.errors import QmpError

_PATIENCE = 2.0  # seconds; a person waits at a command line
_WITH_IDS = ("show", "rm", "get-fd", "exec")


class Completion:
    """Completion for one connection."""

    def __init__(self, connection: Connection, verbs: Sequence[str]) -> None:
        self._connection = connection
        self._verbs = verbs
        self._found: list[str] = []

    def candidate(self, line: str, state: int) -> str | None:
        """Return the candidate number `state` for the last word of the line, as readline asks for them."""
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
        """Return all words that the last word of the line may become; a blank behind those that end there."""
        *before, word = line.split(" ")
        before = [other for other in before if other]
        if before[:1] == ["call"]:
            before = before[1:]
            return self._of_command(before, word) if before else _starting(word, self._commands())
        if not before:
            return _starting(word, [*self._verbs, "help", "exit", *self._commands()])
        if before[0] in self._verbs:
            return _starting(word, self._ids() if before[0] in _WITH_IDS else [])
        return self._of_command(before, word)

    def _of_command(self, before: list[str], word: str) -> list[str]:
        """Complete an argument of command before[0]: its name, or behind "=" its value."""
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
        if name == "id" and before[0] != "object-add":
            values = self._ids()
        if name == "path":
            values = [f"/objects/{found}" for found in self._ids()]
        return _starting(word, [f"{name}={value}" for value in values])

    def _commands(self) -> list[str]:
        return self._connection.introspection.names("command")

    def _ids(self) -> list[str]:
        entries = self._connection.client.execute("qom-list", {"path": "/objects"})
        return [entry["name"] for entry in entries if entry["type"].startswith("child<")]


def _starting(word: str, candidates: Sequence[str]) -> list[str]:
    return sorted(f"{candidate} " for candidate in set(candidates) if candidate.startswith(word))
