"""YAML in block style for JSON values; any YAML parser, 1.1 or 1.2, reads the same value."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

# Strings without quotes: they begin like a word or a path, and hold nothing special in YAML.
_PLAIN = re.compile(r"[A-Za-z_/](?:[A-Za-z0-9_/.,()=+@'-]| (?=[^ ])|:(?=[A-Za-z0-9_/.]))*", re.ASCII)
_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}  # special words, in any case


def as_yaml(value: Any) -> str:
    return "\n".join(_lines(value))


def _lines(value: Any) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for name, part in value.items():
            if isinstance(part, dict | list) and part:
                yield f"{_scalar(name)}:"
                indent = "  " if isinstance(part, dict) else ""
                yield from (indent + line for line in _lines(part))
            else:
                yield f"{_scalar(name)}: {_scalar(part)}"
    elif isinstance(value, list) and value:
        for part in value:
            first, *rest = _lines(part)
            yield f"- {first}"
            yield from (f"  {line}" for line in rest)
    else:
        yield _scalar(value)


def _scalar(value: Any) -> str:
    """Return a value without parts: a string, a number, true, false, null, [] or {}."""
    if isinstance(value, str):
        if _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
            return value
        return "".join(map(_escaped, json.dumps(value, ensure_ascii=False)))
    text = json.dumps(value)
    return re.sub(r"^(-?\d+)e", r"\1.0e", text)  # YAML 1.1 reads 1e+16 as a string


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
