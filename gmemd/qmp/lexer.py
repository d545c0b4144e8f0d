"""Bytes to JSON tokens by QEMU's rules, a chunk at a time (reference qmp.md section 2).

A table-driven automaton. Each state has a pattern for the bytes that keep it, which are taken at one go
(long strings cost no Python per byte), and a table saying where any other byte leads. A token cut by the
end of a chunk waits in `_parts`; nothing is read twice. After a lexical error the automaton skips, in
state _RECOVERY, to a byte that can begin a new token.

Positions are LINE:COL, both from 1, in bytes since the connection was opened. Lines are counted only when needed.
QEMU's quirk is reproduced: a token beginning with a byte that the lexer had already looked at (it ended a number, a
bare word or a recovery) is reported one column too far right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Final, cast

TOKEN_SIZE_LIMIT: Final = 64 << 20  # bytes of one token before it is given up

# Kinds of tokens. Punctuation is its own byte; the others are numbers that are not such a byte.
LEFT_BRACE, RIGHT_BRACE, LEFT_BRACKET, RIGHT_BRACKET, COLON, COMMA = b"{}[]:,"
FLOAT: Final = 0
INTEGER: Final = 1
WORD: Final = 2  # up to here: ended by the next byte, which is not part of it
STRING: Final = 3
STRAY: Final = 4  # a lexical error: the token so far and the offending byte
OVERLONG: Final = 5  # a token cut off after TOKEN_SIZE_LIMIT; what follows is read as new
NO_TOKEN: Final = 6  # not before more data comes


class Lexer:
    """The tokens of one connection. Public attributes are shared with the fast path of Stream."""

    def __init__(self) -> None:
        self.data = b""  # the chunk being read
        self._text: str | None = None  # what plain_text() has found
        self.at = 0  # index in `data` of the next byte to be read
        self.trial_from = 0  # index from which on the fast path is to be tried
        self.single_to = 0  # index up to which it is tried for a single message only
        self.token = b""  # the bytes of the last token
        self.waiting: list[bytes] = []  # chunks not yet begun
        self.feed = self.waiting.append  # stores a chunk
        self._state = _START
        self._parts: list[bytes] = []  # what earlier chunks held of the token being read
        self.pending = 0  # their bytes
        self._cut = 0  # index of the byte that would be one too many for the token
        self._start = 0  # index of the token's first byte; negative if in an earlier chunk
        self._start_seen = False  # that byte had already been looked at
        self._seen = False  # the byte at `at` has already been looked at
        self.line = 1  # of the last byte that is counted
        self.line_start = 0  # index of its first byte; negative if in an earlier chunk
        self._counted = 0  # line feeds before this index are counted

    def load(self) -> bool:
        """Replace the chunk, which must be used up, by all that was fed since; False if that is nothing."""
        waiting = self.waiting
        if not waiting:
            return False
        if self.data:
            self._forget()
        self.data = waiting.pop() if len(waiting) == 1 else b"".join(waiting)
        waiting.clear()
        return len(self.data) > 0

    def _forget(self) -> None:
        """Go on without the chunk, which must be used up."""
        used = len(self.data)
        if not self._state.is_between:
            self._parts.append(self.data[max(self._start, 0) :])
            self.pending += len(self._parts[-1])
        self._count_lines(used)
        self.line_start -= used
        self._start -= used
        self._cut -= used
        self._counted = self.at = self.trial_from = self.single_to = 0
        self.data = b""
        self._text = None

    def skip_chunk(self) -> None:
        """At rest, the chunk used up: the only one that waits was read by another; it has no line feed but its end."""
        if self.data:
            self._forget()
        chunk = self.waiting.pop()
        if chunk[-1] == _LINE_FEED:
            self.line += 1
            self.line_start = 0
        else:
            self.line_start -= len(chunk)

    def plain_text(self) -> str:
        """The chunk as str if it is ASCII without \\u escapes, else an empty one."""
        if self._text is None:
            text = self.data.decode("ascii") if self.data.isascii() else ""
            self._text = "" if "\\u" in text else text
        return self._text

    @property
    def at_rest(self) -> bool:
        """Whether nothing read so far affects the next byte."""
        return self._state is _START and not self._seen

    def skip_blanks(self) -> int:
        """At rest: go to the next byte that is not white space and return it; -1 if none has come yet."""
        while True:
            data, at = self.data, self.at
            if at < len(data):
                first = data[at]
                if first > _BLANK:
                    return first
                self.at = at = _START.take_run(data, at).end()
                if at < len(data):
                    return data[at]
            if not self.load():
                return -1

    def next_token(self) -> int:
        """Return the kind of the next token, whose bytes are then in `token`, or NO_TOKEN."""
        if self._state is _START:
            at = self.at
            found = _plain_token(self.data, at)
            if found is not None:
                kind, end = found.lastindex, found.end()
                if end - at <= _PLAIN_SIZE:
                    assert kind is not None
                    self.token = token = found[kind]
                    self._start = start = end - len(token)
                    self._start_seen = self._seen and start == at
                    self._seen = kind <= WORD
                    self.at = end
                    return kind if kind <= STRING else token[0]
        return self._any_token()

    def _any_token(self) -> int:
        data, at, state = self.data, self.at, self._state
        while True:
            if at >= self._cut and not state.is_between:
                return self._finish(OVERLONG, self._cut)
            if at == len(data):
                self.at, self._state = at, state
                if not self.load():
                    return NO_TOKEN
                data, at = self.data, 0
                continue
            to = state.table[data[at]]
            if to is state:
                at = state.take_run(data, at).end()
                if state is _START:
                    self._seen = False
                continue
            if state is _START:
                self._start, self._start_seen, self._cut = at, self._seen, at + TOKEN_SIZE_LIMIT + 1
            if isinstance(to, int):
                return self._finish(to, at if to <= WORD else at + 1)
            if state is _RECOVERY:
                self._seen = True  # this byte is read again
            else:
                at = to.take_run(data, at + 1).end() if to.has_run else at + 1
            state = to

    def position(self) -> tuple[int, int]:
        """Return line and column of the last token's first byte, as QEMU 11.1 reports them."""
        self._count_lines(self._start)
        return self.line, self._start - self.line_start + 1 + self._start_seen

    def _finish(self, kind: int, end: int) -> int:
        """Make the bytes before index `end` the token."""
        self.token = self.data[max(self._start, 0) : end]
        if self._parts:
            self.token = b"".join(self._parts) + self.token
            self._parts.clear()
            self.pending = 0
        self._state = _RECOVERY if kind == STRAY else _START
        self._seen = kind <= WORD
        self.at = end
        return kind

    def _count_lines(self, to: int) -> None:
        """Count the line feeds before index `to`."""
        if to <= self._counted:
            return
        last = self.data.rfind(_LINE_FEED, self._counted, to)
        if last >= 0:
            self.line += self.data.count(_LINE_FEED, self._counted, to)
            self.line_start = last + 1
        self._counted = to


class _State:
    """One state of the automaton: where each byte leads."""

    def __init__(self, run: bytes = b"", *, is_between: bool = False) -> None:
        """`run` matches the bytes that lead back to the state; `is_between` says that it is in no token."""
        self.has_run = bool(run)
        self.take_run = cast("Callable[[bytes, int], re.Match[bytes]]", re.compile(run).match)
        self.is_between = is_between
        self.table: list[int | _State] = []  # for each byte the next state, or the kind of the token it ends

    def leads(self, *ways: tuple[Iterable[int], int | _State], otherwise: int | _State) -> None:
        """Fill the table."""
        self.table = [otherwise] * 256
        for some_bytes, to in ways:
            for byte in some_bytes:
                self.table[byte] = to


# The usual token, taken at once, after white space: an integer or a word that another byte ends, a complete string, or
# punctuation. The number of the group is its kind, but for punctuation.
_plain_token = re.compile(
    rb'[ \t\r\n]*+(?:(-?(?:0(?=[^.0-9])|[1-9][0-9]*+(?=[^.eE0-9])))|([a-z]++(?=[^a-z]))|'
    rb'("(?:[ !#-\[\]-\xfd]++|\\[ -\xfd])*+")|([{}\[\]:,]))').match
_PLAIN_SIZE: Final = 1 << 16  # bytes, including white space: far below the limit of a token
_BLANK: Final = ord(" ")  # no lower byte begins a token
_LINE_FEED: Final = ord("\n")

_DIGITS: Final = b"0123456789"
_LETTERS: Final = bytes(range(ord("a"), ord("z") + 1))
_IN_STRING: Final = range(0x20, 0xFE)
_AFRESH: Final = b"{}[]:,\xfe\xff" + bytes({*range(0x20)} - {ord("\t")})

_START = _State(rb"[ \t\r\n]*+", is_between=True)
_RECOVERY = _State(rb"[^{}\[\]:,\x00-\x08\x0a-\x1f\xfe\xff]*+", is_between=True)
_DOUBLE = _State(rb"(?:[ !#-\[\]-\xfd]++|\\[ -\xfd])*+")
_DOUBLE_ESCAPE = _State()
_SINGLE = _State(rb"(?:[ -&(-\[\]-\xfd]++|\\[ -\xfd])*+")
_SINGLE_ESCAPE = _State()
_WORD = _State(rb"[a-z]*+")
_MINUS = _State()
_ZERO = _State()
_WHOLE = _State(rb"[0-9]*+")
_POINT = _State()
_FRACTION = _State(rb"[0-9]*+")
_EXPONENT = _State()
_EXPONENT_SIGN = _State()
_EXPONENT_DIGITS = _State(rb"[0-9]*+")

_START.leads(
    *((bytes([byte]), byte) for byte in b"{}[]:,"),
    (b" \t\r\n", _START),
    (b'"', _DOUBLE),
    (b"'", _SINGLE),
    (_LETTERS, _WORD),
    (b"-", _MINUS),
    (b"0", _ZERO),
    (b"123456789", _WHOLE),
    otherwise=STRAY,
)
_RECOVERY.leads((_AFRESH, _START), otherwise=_RECOVERY)
_DOUBLE.leads((_IN_STRING, _DOUBLE), (b'"', STRING), (b"\\", _DOUBLE_ESCAPE), otherwise=STRAY)
_DOUBLE_ESCAPE.leads((_IN_STRING, _DOUBLE), otherwise=STRAY)
_SINGLE.leads((_IN_STRING, _SINGLE), (b"'", STRING), (b"\\", _SINGLE_ESCAPE), otherwise=STRAY)
_SINGLE_ESCAPE.leads((_IN_STRING, _SINGLE), otherwise=STRAY)
_WORD.leads((_LETTERS, _WORD), otherwise=WORD)
_MINUS.leads((b"0", _ZERO), (b"123456789", _WHOLE), otherwise=STRAY)
_ZERO.leads((b".", _POINT), (_DIGITS, STRAY), otherwise=INTEGER)  # "0e1" is not a number
_WHOLE.leads((_DIGITS, _WHOLE), (b".", _POINT), (b"eE", _EXPONENT), otherwise=INTEGER)
_POINT.leads((_DIGITS, _FRACTION), otherwise=STRAY)
_FRACTION.leads((_DIGITS, _FRACTION), (b"eE", _EXPONENT), otherwise=FLOAT)
_EXPONENT.leads((b"+-", _EXPONENT_SIGN), (_DIGITS, _EXPONENT_DIGITS), otherwise=STRAY)
_EXPONENT_SIGN.leads((_DIGITS, _EXPONENT_DIGITS), otherwise=STRAY)
_EXPONENT_DIGITS.leads((_DIGITS, _EXPONENT_DIGITS), otherwise=FLOAT)
