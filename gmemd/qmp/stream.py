"""Bytes to JSON values, message by message (reference qmp.md sections 2 and 3, dialect 11.1).

Accept fast, explain slowly: a message that begins in a chunk of plain text is tried with the C scanner of
the json module, set up to refuse whatever QEMU might see differently; several messages of a line each are one trial.
What it does not accept, whether wrong, unusual or incomplete, goes unchanged to the exact Parser.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from json.scanner import make_scanner
from typing import Any, Final, NoReturn

from gmemd.qmp.lexer import LEFT_BRACE, Lexer
from gmemd.qmp.parser import COUNT_LIMIT, INT64_MIN, INTEGER_DIGITS, NEED_DATA, NESTING_LIMIT, UINT64_MAX, Parser

__all__ = ["NEED_DATA", "Stream"]


LONG: Final = 128 << 10  # weight of a message; a shorter one is checked in a few milliseconds


class LongMessage(dict[str, Any]):
    """An object that takes long to check."""


class Stream:
    """The messages of one connection: feed() it bytes, and take the messages out with next()."""

    def __init__(self, weigh: Callable[[int], None] = lambda weight: None) -> None:
        """`weigh` is called with the weight of an incomplete message, and with 0 when it is complete."""
        self._weigh = weigh
        self._lexer = Lexer()
        self._waiting = self._lexer.waiting  # chunks not yet begun
        self.feed = self._lexer.feed  # stores bytes as they arrived
        self._parser = Parser(self._lexer)
        self._is_at_rest = True  # nothing read so far affects the next byte
        self._is_used_up = True  # and nothing that was begun is left
        self._held = 0  # weight of the incomplete message
        self._ahead: list[dict[str, Any]] = []  # messages that were read with the one before, the last one first

    def next(self) -> Any:
        """Return the next message's value, a QmpError that says why it has none, or NEED_DATA.

        A JSON object is a dict in the order of the text; an integer within -2^63 ... 2^64-1 is an int, any
        other number a float.
        """
        value: Any
        if self._ahead:
            return self._ahead.pop()
        if self._is_used_up:
            waiting = self._waiting
            if not waiting:
                return NEED_DATA
            if len(waiting) == 1:
                value = _scan_whole(waiting[0])
                if value:
                    self._lexer.skip_chunk()
                    return value
                if value is not None and self._lexer.load():
                    self._lexer.trial_from = len(self._lexer.data)
        value = self._next()
        self._is_used_up = self._is_at_rest and self._lexer.at == len(self._lexer.data)
        return value

    def _next(self) -> Any:
        """The same for what is not one message of at most a line."""
        value: Any
        if self._is_at_rest:
            first = self._lexer.skip_blanks()
            if first < 0:
                return NEED_DATA
            if first == LEFT_BRACE:
                value = self._scan()
                if value is not None:
                    return value
        value = self._parser.next()
        self._is_at_rest = self._parser.at_rest
        before, self._held = self._held, 0 if self._is_at_rest else self._parser.weight
        if before or self._held:
            self._weigh(self._held)
        return LongMessage(value) if before > LONG and type(value) is dict else value

    def _scan(self) -> dict[str, Any] | None:
        """Return the object that begins here if the C scanner may check it and accepts it."""
        lexer = self._lexer
        start = lexer.at
        if start < lexer.trial_from:
            return None
        text = lexer.plain_text()
        if not text:
            return None
        if start >= lexer.single_to:
            end = text.rfind("\n", start, start + _TOGETHER) + 1
            ahead = _scan_lines(text[start:end])
            if ahead:
                lexer.at = end
                self._ahead = ahead
                return ahead.pop()
            lexer.single_to = end
        value: dict[str, Any]
        try:
            value, end = _scan_quickly(text, start)
            arguments = value.get("arguments")
            members = len(value) + len(arguments) if type(arguments) is dict else len(value)
            if text.count(":", start, end) != members:
                value, end = _scan_carefully(text, start)
        except (ValueError, StopIteration, RecursionError):
            lexer.trial_from = start + start // _BACK_OFF
            return None
        if end - start > _SURELY_LEGAL and not _is_within_limits(text, start, end):
            return None
        lexer.at = end + text.startswith("\n", end)  # the usual blank, to save a search for more
        return value


_LINE_FEED: Final = ord("\n")
_SURELY_LEGAL: Final = 2 * NESTING_LIMIT  # characters of a message too short to exceed any limit

# The scanner's errors count the lines of the chunk before them, which for each of many messages would be
# quadratic. So after a refusal the scanner is not tried for this fraction of that distance.
_BACK_OFF: Final = 64

_TOGETHER: Final = 2048  # characters of messages that are tried together: others wait some 30 us for that


class _Refusal(ValueError):
    """The scanner must not check this message."""


def _refuse(literal: str) -> NoReturn:
    raise _Refusal(literal)


class _Integers(dict[str, int]):
    """What integer literals are worth. Most are read again and again, and a look-up takes half the time of a call."""

    ROOM: Final = 1024

    def __missing__(self, literal: str) -> int:
        value = int(literal)
        if not INT64_MIN <= value <= UINT64_MAX:
            raise _Refusal(literal)
        if len(self) >= self.ROOM:
            self.clear()
        if len(literal) <= INTEGER_DIGITS:
            self[literal] = value
        return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise _Refusal("duplicate key")
    return members


def _scanner(**hooks: Any) -> Any:
    decoder: Any = json.JSONDecoder(
        parse_int=_Integers().__getitem__, parse_float=_refuse, parse_constant=_refuse, **hooks
    )
    return make_scanner(decoder)


# The first scanner keeps one of two equal keys. Each member has a colon: a message with no more colons than members in
# it and its arguments has no duplicates; any other one goes to the second scanner.
_scan_quickly = _scanner()
_scan_carefully = _scanner(object_pairs_hook=_object)


def _scan_whole(chunk: bytes) -> dict[str, Any] | None:
    """Return the object that is all of a chunk, with no line feed but the last byte, if the C scanner accepts it.

    This is the usual case. None: it is unusual; empty: it need not be tried again.
    """
    end = len(chunk) - 1
    if end >= _SURELY_LEGAL or -1 < chunk.find(_LINE_FEED) < end:
        return None
    value: Any
    try:
        text = chunk.decode("ascii")
        if "\\" in text:
            return None
        value, stop = _scan_quickly(text, 0)
        arguments = value.get("arguments")
    except (ValueError, StopIteration, RecursionError, AttributeError):
        return {}
    if text[stop:] not in ("\n", "", "\r\n"):
        return None
    members = len(value) + len(arguments) if type(arguments) is dict else len(value)
    return value if text.count(":") == members else None


def _scan_lines(text: str) -> list[dict[str, Any]]:
    """The objects of several lines, the last one first, if the C scanner accepts each line as one; else none.

    They are read as a list with a comma after each line. The line feeds stay, so no string goes on in the next line.
    Each line begins with a brace, and there is no other list, so no object does either. So if there are as many objects
    as lines, each line is one.
    """
    lines = text.count("\n")
    if lines < 2 or text.count("\n{") != lines - 1 or "[" in text or "\\" in text or text.count("{") > NESTING_LIMIT:
        return []
    values: list[dict[str, Any]]
    try:
        listed = "[" + text[:-1].replace("\n", ",\n") + "]"
        values, end = _scan_quickly(listed, 0)
    except (ValueError, StopIteration, RecursionError):
        return []
    if end < len(listed) or len(values) != lines:
        return []
    objects = values + [value["arguments"] for value in values if type(value.get("arguments")) is dict]
    return values[::-1] if text.count(":") == sum(map(len, objects)) else []


def _is_within_limits(text: str, start: int, end: int) -> bool:
    brackets = text.count("{", start, end) + text.count("[", start, end)
    return brackets <= NESTING_LIMIT and end - start <= COUNT_LIMIT
