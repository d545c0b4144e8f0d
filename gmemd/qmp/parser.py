"""JSON tokens to values by the rules of QEMU 11.1 (reference qmp.md section 3).

A push parser: each token is checked as it comes against one expectation (the method `_expect`).
Containers under construction are on a list, not on the Python stack. A fault is reported at once; then
tokens are skipped until braces and brackets, which are counted apart, are balanced. An unmatched closing bracket and a
lexical error count as balance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from gmemd.errors import QmpError
from gmemd.qmp.lexer import (
    COLON,
    COMMA,
    FLOAT,
    INTEGER,
    LEFT_BRACE,
    LEFT_BRACKET,
    NO_TOKEN,
    RIGHT_BRACE,
    RIGHT_BRACKET,
    STRAY,
    STRING,
    TOKEN_SIZE_LIMIT,
    WORD,
    Lexer,
)
from gmemd.qmp.strings import ParseFault, decode_string

NEED_DATA: Final = object()  # neither a complete message nor a fault in what was fed so far

# Limits of one message; the first two are QEMU's MAX_TOKEN_SIZE and MAX_TOKEN_COUNT.
SIZE_LIMIT: Final = TOKEN_SIZE_LIMIT  # bytes of all tokens: less than this
COUNT_LIMIT: Final = 2 << 20  # tokens: up to this
NESTING_LIMIT: Final = 1024  # braces and brackets open at once: up to this

_SURELY_LEGAL: Final = min(SIZE_LIMIT, COUNT_LIMIT) // 2  # bytes of tokens that exceed neither limit

INT64_MIN: Final = -(1 << 63)
UINT64_MAX: Final = (1 << 64) - 1
INTEGER_DIGITS: Final = 20  # of the longest literal that can be a 64-bit integer, "-" included

_TOKEN_WEIGHT: Final = 32  # bytes of memory, estimated

_MORE: Final = object()  # the message is not complete


class Parser:
    """The messages of one connection, exact and slow."""

    def __init__(self, lexer: Lexer) -> None:
        self._lexer = lexer
        self._expect: Callable[[Parser, int], Any] = Parser._value
        self._open: list[dict[str, Any] | list[Any]] = []  # containers under construction
        self._keys: list[str] = []  # of the open dicts, each with its value under construction
        self._braces = 0  # open ones
        self._brackets = 0
        self._is_skipping = False
        self._size = 0  # bytes of this message's tokens
        self._count = 0  # its tokens

    @property
    def at_rest(self) -> bool:
        """Whether the next byte begins a message."""
        return not self._count and not self._is_skipping and self._lexer.at_rest

    @property
    def weight(self) -> int:
        """The memory for the message being read: the bytes of its tokens, and the values made of them."""
        return self._size + _TOKEN_WEIGHT * self._count + self._lexer.pending

    def next(self) -> Any:
        """Return the next message's value, a QmpError that says why it has none, or NEED_DATA."""
        lexer = self._lexer
        next_token = lexer.next_token
        while (kind := next_token()) != NO_TOKEN:
            if kind > COLON or kind == STRAY:  # a brace or bracket, or what counts as one
                self._balance(kind)
            if self._is_skipping:
                self._is_skipping = self._braces + self._brackets > 0
                continue
            self._size += len(lexer.token)
            self._count += 1
            try:
                if kind == STRAY or self._size > _SURELY_LEGAL or self._braces + self._brackets > NESTING_LIMIT:
                    self._check(kind)
                value = self._expect(self, kind)
            except (ParseFault, QmpError) as fault:
                self._give_up()
                return self._explain(fault)
            if value is not _MORE:
                self._size = self._count = 0
                return value
        return NEED_DATA

    def _balance(self, kind: int) -> None:
        """Count braces and brackets; one that closes nothing and a lexical error count as balance."""
        if kind == LEFT_BRACE:
            self._braces += 1
        elif kind == LEFT_BRACKET:
            self._brackets += 1
        elif kind == RIGHT_BRACE and self._braces:
            self._braces -= 1
        elif kind == RIGHT_BRACKET and self._brackets:
            self._brackets -= 1
        else:
            self._braces = self._brackets = 0

    def _give_up(self) -> None:
        """Drop the message so far, and skip the rest of it."""
        self._open.clear()
        self._keys.clear()
        self._expect = Parser._value
        self._size = self._count = 0
        self._is_skipping = self._braces + self._brackets > 0

    def _explain(self, fault: ParseFault | QmpError) -> QmpError:
        if isinstance(fault, QmpError):
            return fault
        line, column = self._lexer.position()
        return QmpError(f"{line}:{column}: JSON parse error, {fault.text}")

    def _check(self, kind: int) -> None:
        """Raise for a token that is wrong anywhere."""
        if kind == STRAY:
            raise ParseFault(b"stray '" + self._lexer.token.partition(b"\0")[0] + b"'")
        if self._size >= SIZE_LIMIT:
            raise QmpError("JSON token size limit exceeded")
        if self._count > COUNT_LIMIT:
            raise QmpError("JSON token count limit exceeded")
        if self._braces + self._brackets > NESTING_LIMIT:
            raise QmpError("JSON nesting depth limit exceeded")

    # The expectations: what may come next, and what it does. Each returns the message's value if the token
    # completes it, else _MORE, or raises when it is wrong.

    def _value(self, kind: int) -> Any:
        if kind == LEFT_BRACE:
            self._open.append({})
            self._expect = Parser._key_or_brace
        elif kind == LEFT_BRACKET:
            self._open.append([])
            self._expect = Parser._value_or_bracket
        elif kind == STRING:
            return self._complete(decode_string(self._lexer.token))
        elif kind in _SCALARS:
            return self._complete(_SCALARS[kind](self._lexer.token))
        else:
            raise ParseFault(b"expecting value")
        return _MORE

    def _value_or_bracket(self, kind: int) -> Any:
        return self._complete(self._open.pop()) if kind == RIGHT_BRACKET else self._value(kind)

    def _key_or_brace(self, kind: int) -> Any:
        return self._complete(self._open.pop()) if kind == RIGHT_BRACE else self._key(kind)

    def _key(self, kind: int) -> Any:
        if kind != STRING:
            raise ParseFault(b"expecting key")
        self._keys.append(decode_string(self._lexer.token))
        self._expect = Parser._colon
        return _MORE

    def _colon(self, kind: int) -> Any:
        if kind != COLON:
            raise ParseFault(b"expecting ':'")
        self._expect = Parser._value
        return _MORE

    def _comma_or_brace(self, kind: int) -> Any:
        if kind == RIGHT_BRACE:
            return self._complete(self._open.pop())
        if kind != COMMA:
            raise ParseFault(b"expected ',' or '}'")
        self._expect = Parser._key
        return _MORE

    def _comma_or_bracket(self, kind: int) -> Any:
        if kind == RIGHT_BRACKET:
            return self._complete(self._open.pop())
        if kind != COMMA:
            raise ParseFault(b"expected ',' or ']'")
        self._expect = Parser._value
        return _MORE

    def _complete(self, value: Any) -> Any:
        """Put a complete value where it belongs; return it if it is the whole message."""
        if not self._open:
            self._expect = Parser._value
            return value
        container = self._open[-1]
        if isinstance(container, list):
            container.append(value)
            self._expect = Parser._comma_or_bracket
            return _MORE
        key = self._keys.pop()
        if key in container:
            raise ParseFault(b"duplicate key")
        container[key] = value
        self._expect = Parser._comma_or_brace
        return _MORE


def _keyword(token: bytes) -> bool | None:
    if token not in _KEYWORDS:
        raise ParseFault(b"invalid keyword '" + token + b"'")
    return _KEYWORDS[token]


def _integer(token: bytes) -> int | float:
    """Read as signed, else unsigned 64 bit integer, else as double."""
    if len(token) <= INTEGER_DIGITS and INT64_MIN <= (value := int(token)) <= UINT64_MAX:
        return value
    return float(token)


_KEYWORDS: Final = {b"true": True, b"false": False, b"null": None}
_SCALARS: Final[dict[int, Callable[[bytes], Any]]] = {INTEGER: _integer, FLOAT: float, WORD: _keyword}
