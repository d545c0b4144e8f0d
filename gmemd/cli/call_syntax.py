"""The call syntax: from the words COMMAND key=value ... to a command's arguments.

The types come from introspection, so on/off, 1G and 0-3 become what the command wants; a word that does not fit its
type is sent as it is, and the server says what is wrong with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from gmemd.cli.introspection import Introspection, Member

_WORDS = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}


class UsageError(Exception):
    """The command line is wrong; nothing was sent."""


def arguments_of(words: Iterable[str], command: str, introspection: Introspection) -> dict[str, Any]:
    """Return the arguments that the words specify: key=value, key.key=value, or a JSON object; UsageError.

    A repeated key extends its list, as in QEMU's host-nodes=0,host-nodes=2.
    """
    pairs: list[tuple[str, str]] = []
    arguments: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if word.startswith("{"):
            arguments |= _json_object(word)
        elif not equals or not key:
            raise UsageError(f"'{word}' is not of the form key=value")
        else:
            pairs.append((key, text))
    # the words that select a variant decide the types of the others
    chosen = {**arguments, **dict(pairs)}
    for key, text in pairs:
        _put(arguments, key, text, introspection.members(command, chosen), introspection)
    return arguments


def value_of(text: str, type_name: str, introspection: Introspection) -> Any:
    """Return a word as a value of that type; the word itself if it is not one."""
    entry = introspection.entry(type_name)
    kind = entry.get("meta-type")
    if kind == "builtin":
        return _builtin(text, entry["json-type"])
    if kind == "array":
        return _array(text, entry["element-type"], introspection)
    if kind == "alternate":
        return _alternate(text, introspection.parts(type_name), introspection)
    if kind == "enum":
        return text
    return _json_or_text(text) if text.startswith("{") else text


def parse_integer(text: str) -> int | None:
    """Return an integer as QEMU's command line reads it: 4096, 0x1000, 4k, 1.5G, or -1; None if it is not one."""
    if text.startswith("-") and text[1:].isascii() and text[1:].isdigit():
        return int(text)
    from gmemd.schema.sizes import parse_size

    return parse_size(text)


def _put(target: dict[str, Any], key: str, text: str, members: list[Member], known: Introspection) -> None:
    member = next((member for member in members if member.name == key), None)
    head, dot, rest = key.partition(".")
    outer = next((member for member in members if member.name == head), None)
    if member is None and dot and outer is not None:
        inner = target.setdefault(head, {})
        if not isinstance(inner, dict):
            raise UsageError(f"'{key}' and '{head}' cannot both be given")
        return _put(inner, rest, text, known.object_members(outer.type, inner), known)
    value = _json_or_text(text) if member is None else value_of(text, member.type, known)
    old = target.get(key)
    target[key] = old + value if isinstance(old, list) and isinstance(value, list) else value
    return None


def _builtin(text: str, json_type: str) -> Any:
    if json_type == "string":
        return text
    if json_type == "boolean":
        return _WORDS.get(text, text)
    if json_type == "int":
        number = parse_integer(text)
        return text if number is None else number
    return _json_or_text(text)  # number, null, value (any)


def _array(text: str, element_type: str, introspection: Introspection) -> Any:
    if text.startswith("["):
        return _json_or_text(text)
    if not text:
        return []
    from gmemd.schema.sizes import parse_range

    found: list[Any] = []
    for part in text.split(","):
        span = parse_range(part) if element_type == "int" else None
        found += [value_of(part, element_type, introspection)] if span is None else span
    return found


def _alternate(text: str, parts: list[str], introspection: Introspection) -> Any:
    """Use the first meaning that is not merely a string: a word of an enum, then JSON of the right type."""
    for part in parts:
        if introspection.entry(part).get("meta-type") != "array" and text in introspection.values(part):
            return text
    for part in parts:
        value = value_of(text, part, introspection)
        if value != text:
            return value
    return text


def _json_or_text(text: str) -> Any:
    try:
        return _loads(text)
    except (ValueError, RecursionError):
        return text


def _json_object(word: str) -> dict[str, Any]:
    try:
        value: dict[str, Any] = _loads(word)
    except (ValueError, RecursionError) as exc:
        raise UsageError(f"'{word}' is not JSON: {exc}") from None
    return value


def _loads(text: str) -> Any:
    """Read JSON without the json module's extensions: NaN, Infinity, 1e400."""
    return json.loads(text, parse_constant=_finite, parse_float=_finite)


def _finite(literal: str) -> float:
    value = float(literal)
    if value - value != 0:
        raise ValueError(f"{literal} is not a JSON number")
    return value
