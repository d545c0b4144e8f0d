"""Values to the bytes QEMU writes (reference qmp.md section 4).

Pure ASCII, ", " and ": ", doubles as C's %.17g, and the members of an object in the order of QEMU's QDict,
which is a hash table: bucket by bucket, inside a bucket the last inserted first. Accept fast, explain slowly: strings
of printable ASCII go through the C encoder, the rest through _escape; trees of usual depth are written by recursion,
deeper ones by a loop, because 1024 levels are legal and the Python stack must not decide.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from json.encoder import encode_basestring_ascii as _quote
from typing import Any, Final

_RECURSION_DEPTH: Final = 50  # levels; deeper ones go to _write_all
_CACHED_SHAPES: Final = 1024  # key tuples whose order is remembered
_CACHED_MEMBERS: Final = 32  # keys of a tuple worth remembering; limits the cache together with _CACHED_KEY
_CACHED_KEY: Final = 64  # characters of a key worth remembering
_BUCKETS: Final = 512


def encode(value: Any) -> bytes:
    """Write one JSON value as QEMU does on one line, without the CR LF after it."""
    if type(value) is str:
        return _write_str(value).encode("ascii")
    return _text(value, 0).encode("ascii")


def encode_pretty(value: Any) -> bytes:
    """Write one JSON value as QEMU does with pretty=on: 4 blanks a level, lines joined by CR LF."""
    return _write_all(value, newline="\r\n").encode("ascii")


class Indented:
    """An encoded value as it appears in a reply with pretty=on."""

    __slots__ = ("text",)

    def __init__(self, text: bytes) -> None:
        self.text = text


def indented(text: bytes) -> Iterator[bytes]:
    """Write the output of `encode` as it appears in a reply with pretty=on, piece by piece."""
    at, level = 0, 1
    for found in _marks(text):
        mark = found.group()
        if mark.startswith(b'"'):
            continue
        yield text[at : found.start()]
        at = found.end()
        if mark in b"[{":
            level += 1
            yield mark if text[at] in b"]}" else mark + _new_line(level)
        elif mark in b"]}":
            level -= 1
            yield _new_line(level) + mark
        else:
            yield b"," + _new_line(level)
    yield text[at:]


def _new_line(level: int) -> bytes:
    return b"\r\n" + b"    " * level


_marks: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[{\]}]|, ').finditer


def member_order(names: Iterable[str]) -> list[str]:
    """Sort member names, given in the order of insertion, into the order in which QEMU walks them."""
    return sorted(reversed(list(names)), key=_bucket)


def _text(value: Any, depth: int) -> str:
    kind = type(value)
    if kind is not dict and kind is not list:
        return _writer(kind)(value)
    if not value:
        return "{}" if kind is dict else "[]"
    if depth == _RECURSION_DEPTH:
        return _write_all(value)
    depth += 1
    writer = _WRITERS.get
    if kind is list:
        parts = [write(v) if (write := writer(type(v))) else _text(v, depth) for v in value]
        return "[" + ", ".join(parts) + "]"
    shape = _shapes.get(tuple(value)) or _shape(value)
    parts = [
        label + (write(v) if (write := writer(type(v := value[key]))) else _text(v, depth)) for label, key in shape
    ]
    return "{" + ", ".join(parts) + "}"


def _writer(kind: type) -> Callable[[Any], str]:
    """Find what writes a scalar; subclasses of str and int (enumerations) are written as these."""
    if kind in _WRITERS:
        return _WRITERS[kind]
    for base in (str, int, float):
        if issubclass(kind, base):
            return _WRITERS[base]
    raise TypeError(f"{kind.__name__} is not a JSON value")


def _write_str(value: str) -> str:
    return _quote(value) if value.isascii() and value.isprintable() else _escape(value)


_WRITERS: Final[dict[type, Callable[[Any], str]]] = {
    bool: {True: "true", False: "false"}.__getitem__,
    float: "{:.17g}".format,
    int: int.__repr__,
    str: _write_str,
    type(None): {None: "null"}.__getitem__,
}

_Shape = tuple[tuple[str, str], ...]  # of an object: (quoted key with ": ", key) in member order
_shapes: dict[tuple[str, ...], _Shape] = {}


def _shape(members: dict[str, Any]) -> _Shape:
    """Order the members, and remember the order if they look like ones that will recur."""
    keys = tuple(members)
    shape = tuple((_write_str(key) + ": ", key) for key in member_order(keys))
    if len(keys) <= _CACHED_MEMBERS and max(map(len, keys), default=0) <= _CACHED_KEY:
        if len(_shapes) >= _CACHED_SHAPES:
            _shapes.clear()
        _shapes[keys] = shape
    return shape


def _bucket(name: str) -> int:
    """Find QDict's bucket of a name: a hash over the bytes of the C string (NUL as C0 80), 32 bits."""
    return _remembered_bucket(name) if len(name) <= _CACHED_KEY else _compute_bucket(name)


def _compute_bucket(name: str) -> int:
    data = name.encode("utf-8", "surrogatepass").replace(b"\0", b"\xc0\x80")
    value = 0x238F13AF * len(data) + sum(byte << (5 * i % 24) for i, byte in enumerate(data))
    return ((1103515243 * value + 12345) & 0xFFFFFFFF) % _BUCKETS


_remembered_bucket = lru_cache(maxsize=2048)(_compute_bucket)


def _escape(value: str) -> str:
    return '"' + value.translate(_escapes) + '"'


class _Escapes(dict[int, str]):
    """For str.translate: what each code point is written as. Filled when needed, up to a limit."""

    ROOM: Final = 8192

    def __missing__(self, code: int) -> str:
        text = _escape_character(code)
        if len(self) < self.ROOM:
            self[code] = text
        return text


def _escape_character(code: int) -> str:
    if 0xD800 <= code <= 0xDFFF or 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE:
        return "\\uFFFD"  # not a valid character, so QEMU's UTF-8 decoder refuses it
    if code > 0xFFFF:
        code -= 0x10000
        return f"\\u{0xD800 + (code >> 10):04X}\\u{0xDC00 + (code & 0x3FF):04X}"
    return f"\\u{code:04X}"


_escapes = _Escapes({code: chr(code) for code in range(0x20, 0x7F)})
_escapes.update(zip(b'\b\f\n\r\t"\\', ("\\b", "\\f", "\\n", "\\r", "\\t", '\\"', "\\\\"), strict=True))


def _write_all(value: Any, newline: str | None = None) -> str:
    """Write a tree of any depth in a loop; with `newline`, pretty: members and brackets on their own lines."""
    out: list[str] = []
    open_ends: list[tuple[str, Iterator[tuple[str, Any]]]] = []  # closing bracket, members still to come
    label = ""
    while True:
        if isinstance(value, (dict, list)):
            out.append(label + ("{" if isinstance(value, dict) else "["))
            open_ends.append(("}" if isinstance(value, dict) else "]", _labelled(value)))
            separator = ""
        else:
            out.append(label + _writer(type(value))(value))
            separator = "," if newline else ", "
        while open_ends:
            bracket, members = open_ends[-1]
            member = next(members, None)
            if member is not None:
                label, value = member
                break
            open_ends.pop()
            out.append(_break(newline, len(open_ends)) + bracket)
            separator = "," if newline else ", "
        else:
            return "".join(out)
        out.append(separator + _break(newline, len(open_ends)))


def _labelled(container: dict[str, Any] | list[Any]) -> Iterator[tuple[str, Any]]:
    """Yield each member in output order with the text before its value."""
    if isinstance(container, dict):
        yield from ((label, container[key]) for label, key in _shape(container))
    else:
        yield from (("", element) for element in container)


def _break(newline: str | None, level: int) -> str:
    return newline + "    " * level if newline else ""
