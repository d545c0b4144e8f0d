"""String tokens to str, and the bytes quoted in error texts to str, by QEMU's rules (qmp.md section 2).

QEMU keeps strings in modified UTF-8: NUL is C0 80, and non-characters count as bad.
"""

from __future__ import annotations

import re
from typing import Final

_TEXT_LIMIT: Final = 1023  # bytes of a fault's text; QEMU formats it into a buffer of 1024

_SIMPLE_ESCAPES: Final = {
    ord(letter): character for letter, character in zip("bfnrt\"'\\/", "\b\f\n\r\t\"'\\/", strict=True)
}
_escape_or_run = re.compile(rb"\\u|\\(.)|[^\\]+", re.DOTALL)
_four_hex_digits = re.compile(rb"[0-9A-Fa-f]{4}")
_non_character = re.compile(
    "[\ufdd0-\ufdef" + "".join(chr(plane << 16 | last) for plane in range(17) for last in (0xFFFE, 0xFFFF)) + "]"
)
# One unit of (possibly bad) UTF-8: a lead byte with the continuation bytes it asks for, as far as they come.
_utf8_unit = re.compile(
    rb"[\x00-\x7f]+|[\xc0-\xdf][\x80-\xbf]?|[\xe0-\xef][\x80-\xbf]{0,2}|[\xf0-\xf7][\x80-\xbf]{0,3}"
    rb"|[\xf8-\xfb][\x80-\xbf]{0,4}|[\xfc-\xfd][\x80-\xbf]{0,5}|[\x80-\xbf\xfe\xff]"
)


class ParseFault(Exception):
    """What is wrong with a token: the text behind "JSON parse error, ", which may hold raw input bytes."""

    def __init__(self, text: bytes) -> None:
        super().__init__(text)
        self.text = readable(text[:_TEXT_LIMIT])


def decode_string(token: bytes) -> str:
    """Read a string token, quotes included; raise ParseFault for the first fault in it."""
    if b"\\" not in token:
        return _decode_run(token[1:-1])
    out: list[str] = []
    at = 1
    while at < len(token) - 1:
        found = _escape_or_run.match(token, at, len(token) - 1)
        assert found is not None
        if token[at] != 0x5C:
            out.append(_decode_run(found[0]))
        elif found[1] is None:
            character, length = _decode_unicode_escape(token, at)
            out.append(character)
            at += length
            continue
        elif found[1][0] in _SIMPLE_ESCAPES:
            out.append(_SIMPLE_ESCAPES[found[1][0]])
        else:
            raise ParseFault(b"invalid escape sequence in string")
        at = found.end()
    return "".join(out)


def readable(data: bytes) -> str:
    """Read bytes as QEMU prints them: each bad UTF-8 sequence as one U+FFFD."""
    if data.isascii():
        return data.decode("ascii")
    return "".join("\ufffd" if (text := _decode_utf8(unit)) is None else text for unit in _utf8_unit.findall(data))


def _decode_run(data: bytes) -> str:
    """Read the part of a string that has no escapes."""
    text = data.decode("ascii") if data.isascii() else _decode_utf8(data)
    if text is None:
        raise ParseFault(b"invalid UTF-8 sequence in string")
    return text


def _decode_utf8(data: bytes) -> str | None:
    """Read modified UTF-8; None if it is bad."""
    try:
        text = data.replace(b"\xc0\x80", b"\0").decode("utf-8")
    except UnicodeDecodeError:
        return None
    return None if _non_character.search(text) else text


def _decode_unicode_escape(token: bytes, at: int) -> tuple[str, int]:
    r"""Read the \uXXXX at `at`, with a second one if it begins a surrogate pair: character and length."""
    code, length = _hex_digits(token, at + 2), 6
    if 0xD800 <= code <= 0xDBFF and token[at + 6 : at + 8] == b"\\u":
        low = _hex_digits(token, at + 8)
        if 0xDC00 <= low <= 0xDFFF:
            code, length = 0x10000 + ((code & 0x3FF) << 10 | low & 0x3FF), 12
    if code < 0 or 0xD800 <= code <= 0xDFFF or _non_character.match(chr(code)):
        raise ParseFault(token[at : at + length] + b" is not a valid Unicode character")
    return chr(code), length


def _hex_digits(token: bytes, at: int) -> int:
    """Read four hex digits, or return -1 if they are not there."""
    found = _four_hex_digits.match(token, at)
    return int(found[0], 16) if found else -1
