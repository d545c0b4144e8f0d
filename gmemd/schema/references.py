"""Which definitions of qom.json a part of it needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


def references(schema: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """The definitions that a schema refers to, directly or not: a validator keeps a copy of all it is given."""
    found: dict[str, Any] = {}
    names = list(_referred_to(schema))
    while names:
        name = names.pop()
        if name not in found:
            found[name] = definitions[name]
            names += _referred_to(definitions[name])
    return found


def _referred_to(schema: Any) -> Iterator[str]:
    parts: Iterable[Any] = ()
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"].rpartition("/")[2]
        parts = schema.values()
    elif isinstance(schema, list):
        parts = schema
    for part in parts:
        yield from _referred_to(part)
