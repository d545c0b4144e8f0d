"""The client's side of the wire: bytes and descriptors in, JSON objects with their descriptors out.

A unix stream socket ends a read after the bytes that carried fds (unix(7)), so they belong to the message that holds
the last byte of that read.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections import deque
from typing import Any


class ProtocolError(ConnectionError):
    """The peer does not speak QMP; the connection is no longer usable."""


class Messages:
    """Cuts a byte stream into JSON objects, and gives each the fds that came with it.

    QMP servers end a message with a line feed, and most messages are one line: that is tried first, and a server that
    has done so once, as with its greeting, is trusted to do so again.
    Otherwise (pretty-printed, or no line feed) brackets outside of strings are counted; the count is kept, so that no
    byte is looked at twice.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._dropped = 0  # bytes of the stream before the buffer
        self._fds: deque[tuple[int, list[int]]] = deque()  # (end of the read in the stream, its fds)
        self._by_line = True
        self._ends_lines = False  # the server has ended a message with a line feed
        self._reset()

    def feed(self, data: bytes, fds: list[int]) -> None:
        """Take the result of one read; the fds are now ours."""
        self._buffer += data
        if fds:
            self._fds.append((self._dropped + len(self._buffer), fds))

    def next(self) -> tuple[dict[str, Any], list[int]] | None:
        """Return the next message and its fds, which become the caller's; None: it is still incomplete."""
        self._check_start()
        line_end = self._line_end() if self._by_line else None
        if line_end is not None:
            with contextlib.suppress(ValueError, RecursionError):
                message = json.loads(self._buffer[:line_end])
                self._ends_lines = True
                return message, self._take(line_end)
            self._by_line, self._looked = False, 0  # more than a line, or more than one message on it
        if self._by_line or (end := self._end()) is None:
            return None
        try:
            return json.loads(self._buffer[:end]), self._take(end)
        except (ValueError, RecursionError) as exc:
            raise ProtocolError(f"the server sent something that is not JSON: {exc}") from None

    def close(self) -> None:
        """Close the fds of messages that were never taken."""
        while self._fds:
            close_all(self._fds.popleft()[1])

    def _reset(self) -> None:
        self._looked = 0  # bytes of the buffer already looked at
        self._depth = 0
        self._in_string = False
        self._by_line = True

    def _take(self, end: int) -> list[int]:
        """Drop a message of that many bytes and the white space after it; return its fds."""
        end = _end_of_blanks(self._buffer, end)
        del self._buffer[:end]
        self._dropped += end
        self._reset()
        found: list[int] = []
        while self._fds and self._fds[0][0] <= self._dropped:
            found += self._fds.popleft()[1]
        return found

    def _check_start(self) -> None:
        if self._looked == 0 and self._buffer:
            del self._buffer[: (blanks := _end_of_blanks(self._buffer, 0))]
            self._dropped += blanks
            if self._buffer and not self._buffer.startswith(b"{"):
                raise ProtocolError("the server sent something that is not a JSON object")

    def _line_end(self) -> int | None:
        """Return where the first line ends; None: not there yet, or counting has to decide."""
        if line := self._buffer.find(b"\n", self._looked) + 1:
            return line
        self._looked = len(self._buffer)
        if self._buffer.endswith(b"}") and not self._ends_lines:
            self._by_line, self._looked = False, 0
        return None

    def _end(self) -> int | None:
        """Return where the first message ends, by counting brackets; None: not there yet."""
        while found := (_STRING if self._in_string else _STRUCTURE).search(self._buffer, self._looked):
            token = found.group()
            self._looked = found.end()
            if self._in_string:
                self._in_string = token != b'"'
            elif token == b'"':
                self._in_string = True
            else:
                self._depth += 1 if token in b"{[" else -1
                if self._depth == 0:
                    return self._looked
        half_escape = self._looked < len(self._buffer) and self._in_string and self._buffer.endswith(b"\\")
        self._looked = len(self._buffer) - half_escape
        return None


def _end_of_blanks(data: bytearray, start: int) -> int:
    found = _BLANKS.match(data, start)
    return found.end() if found else start


_BLANKS = re.compile(rb"[ \t\r\n]*")
_STRUCTURE = re.compile(rb'["{}\[\]]')
_STRING = re.compile(rb'"|\\.', re.DOTALL)


def close_all(fds: list[int]) -> None:
    """Close unwanted fds."""
    for fd in fds:
        os.close(fd)
