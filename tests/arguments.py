"""Arguments of every command, made from the schema."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from gmemd.schema.validate import Schema


def of_every_command(schema: Schema, value: Callable[[str, dict[str, Any]], Any]) -> Iterator[
        tuple[str, dict[str, Any], dict[str, Any]]]:
    """(command, its required members, all its members) for each of its shapes; `value(member, its schema)`."""
    definitions = schema.document["$defs"]
    for name, command in schema.commands.items():
        cases = [key for key in definitions if key.startswith(f"{command.arguments}:")]
        for key in cases or [command.arguments]:
            shape = definitions[key]
            members = {member: value(member, inner) for member, inner in shape["properties"].items()}
            if "qom-type" in members:
                members["qom-type"] = key.partition(":")[2]
            yield name, {member: members[member] for member in shape.get("required", ())}, members
