"""What a verb works with: the server, its introspection, and how to print."""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from gmemd.cli import render
from gmemd.cli.call_syntax import UsageError
from gmemd.cli.introspection import Introspection
from gmemd.cli.parser import Verb, first_words, make_parser
from gmemd.errors import QmpError

if TYPE_CHECKING:
    from gmemd.client.client import Client

DONE, REFUSED = 0, 1
_HINT_SECONDS = 2.0  # seconds; a hint is not worth a longer wait
_FEW = 5  # ids named where there may be any number


class Connection:
    """The client, the server's last refusal, and how to print."""

    def __init__(self, connect: Callable[[], Client], verbs: Mapping[str, Verb], *, output: str = "table",
                 dry_run: bool = False) -> None:
        """`connect` is called when a verb first needs the server."""
        self.verbs = verbs
        self.output = output
        self.dry_run = dry_run  # changes are only checked
        self.asked: tuple[str, dict[str, Any]] = ("", {})
        self._connect = connect

    @cached_property
    def client(self) -> Client:
        return self._connect()

    def close(self) -> None:
        """Close the connection; there is a new one if the server is needed again."""
        if "client" in vars(self):
            vars(self).pop("client").close()

    def reconnect(self) -> None:
        """Connect again when the server is next needed."""
        self.close()
        vars(self).pop("client", None)

    @property
    def for_people(self) -> bool:
        return self.output in ("table", "wide")

    @contextmanager
    def lent(self, options: Namespace) -> Iterator[None]:
        """Use other options for a while."""
        client = self.client
        usual = self.output, self.dry_run, client.timeout
        self.output, self.dry_run, client.timeout = options.output, getattr(options, "dry_run", False), options.timeout
        try:
            yield
        finally:
            self.output, self.dry_run, client.timeout = usual

    # -- commands

    def execute(self, command: str, arguments: dict[str, Any] | None = None, fds: Sequence[int] = ()) -> Any:
        """Run a command and return its value; fds of the reply are closed, with a note."""
        self.asked = (command, arguments or {})
        value, received = self.client.execute_fds(command, arguments, fds=fds)
        for fd in received:
            note(f"received a descriptor of {os.readlink(f'/proc/self/fd/{fd}')}; 'gmemctl exec' can use one")
            os.close(fd)
        return value

    def execute_fds(self, command: str, arguments: dict[str, Any]) -> tuple[Any, list[int]]:
        """Run a command and return its value and fds, now the caller's."""
        self.asked = (command, arguments)
        return self.client.execute_fds(command, arguments)

    def change(self, command: str, arguments: dict[str, Any]) -> Any:
        """Run a command that changes something; with --dry-run say what it would do, or for programs return that."""
        if not self.dry_run:
            return self.execute(command, arguments)
        self.asked = (command, arguments)
        try:
            found = self.client.execute("query-command-effect", {"command": command, "arguments": arguments})
        except QmpError as error:
            if "query-command-effect" not in error.desc:
                raise
            raise UsageError("this server cannot check commands without running them") from None
        if not self.for_people:
            return {"command": command, **found}
        print(f"{command} {found['effect']}" + ("" if found["complete"] else " (if the kernel lets it)"))
        return None

    @cached_property
    def introspection(self) -> Introspection:
        return Introspection(self.client.execute("query-qmp-schema"))

    @cached_property
    def parser(self) -> ArgumentParser:
        return make_parser(self.verbs)

    def names(self, kind: str) -> list[str]:
        """Return the names of a kind: verbs, commands, events, types, owners, rooms, jobs, snapshots and ids (memory
        first)."""
        if kind == "verbs":
            return first_words(self.verbs)
        if kind in ("commands", "events"):
            return self.introspection.names(kind.removesuffix("s"))
        if kind == "snapshots":
            return [one["name"] for one in self.client.execute("query-memdev-snapshots")]
        if kind == "rooms":
            return [one["id"] for one in self.client.execute("query-memdev-rooms")]
        if kind == "jobs":
            return [job["id"] for job in self.client.execute("query-jobs")]
        if kind == "owners":
            return sorted({render.user(one["owner"]["uid"]) for one in self.statuses() if "owner" in one})
        if kind == "types":
            found = self.client.execute("qom-list-types", {"implements": "memory-backend"})
            return sorted(short_type(entry["name"]) for entry in found)
        return self.memory() + [name for is_memory, name in self.objects() if not is_memory]

    def memory(self) -> list[str]:
        """Return the ids of all memory backends, lost ones too, sorted."""
        return sorted([*(name for is_memory, name in self.objects() if is_memory),
                       *(record["id"] for record in self.lost_objects())])

    def objects(self) -> list[tuple[bool, str]]:
        """Return, for each object, whether it is memory, and its id, sorted."""
        listed = self.client.execute("qom-list", {"path": "/objects"})
        return sorted((entry["type"].startswith("child<memory-backend-"), entry["name"]) for entry in listed
                      if entry["type"].startswith("child<"))

    def statuses(self, *, survival: bool = False) -> list[dict[str, Any]]:
        """Return the status of each object; `survival`, which is most of it, also from a server that cannot leave it
        out."""
        if not survival:
            try:
                return list(self.execute("query-memdev-status", {"survival": False}))
            except QmpError as error:
                if "'survival'" not in error.desc:
                    raise
        return list(self.execute("query-memdev-status"))

    def lost_objects(self) -> list[dict[str, Any]]:
        """Return the objects whose memory did not come back with the daemon; none if the server cannot say."""
        try:
            return sorted(self.client.execute("query-memdev-lost"), key=lambda record: str(record["id"]))
        except QmpError:
            return []

    # -- output

    def show(self, value: Any, command: str = "") -> None:
        """Print the result of `command`; an empty one not for people."""
        if self.output == "json":
            print(json.dumps(value, indent=2, ensure_ascii=False))
        elif self.output == "yaml":
            from gmemd.cli.block_yaml import as_yaml

            print(as_yaml(value))
        elif self.output == "name":
            _print_names(value)
        elif value not in ({}, []):
            has_members = isinstance(value, dict) or (isinstance(value, list) and isinstance(value[0], dict))
            order = self.introspection.result_members(command) if has_members and command else ()
            render.show(render.value(value, ("id", *order)))

    def show_message(self, message: Any) -> None:
        """Print one of many messages, for programs."""
        if self.output == "yaml":
            print("---")
            self.show(message)
        else:
            print(render.as_line(message), flush=True)

    def explain(self, error: QmpError) -> None:
        """Print the server's message, and hints below it."""
        from gmemd.cli.hints import Refusal, hints

        note(error.desc)
        client = self.client
        ask = partial(client.execute, timeout=min(client.timeout or _HINT_SECONDS, _HINT_SECONDS))
        of_verbs = [hint for verb in self.verbs.values() for hint in verb.hints]
        for line in hints(Refusal(error, *self.asked, ask), of_verbs):
            print(f"  hint: {line}", file=sys.stderr)


def _print_names(value: Any) -> None:
    found = value if isinstance(value, list) else [value]
    names = [part.get("id", part.get("name")) for part in found if isinstance(part, dict)]
    if len(names) < len(found) or not all(names):
        raise UsageError("-o name: this has no ids; use -o table, json or yaml")
    for name in dict.fromkeys(names):
        print(name)


def note(text: str) -> None:
    """Print a note that is not part of the result."""
    print(f"gmemctl: {text}", file=sys.stderr)


def short_type(qom_type: str) -> str:
    return qom_type.removeprefix("memory-backend-")


def note_lost(lost: Sequence[dict[str, Any]]) -> None:
    """Print a note about lost objects, and how to free their ids."""
    if lost:
        ids = " ".join([*(record["id"] for record in lost[:_FEW]), *["..."] * (len(lost) > _FEW)])
        note(f"the memory of {len(lost)} {'objects' if len(lost) > 1 else 'object'} is lost; "
             f"to remove it and free the id: gmemctl rm {ids}")
