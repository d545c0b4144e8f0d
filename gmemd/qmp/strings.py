"""String tokens to str, and the bytes quoted in error texts to str, by QEMU's rules (qmp.md section 2).

QEMU keeps strings in modified UTF-8: NUL is C0 80, and non-characters (the last two code points of each plane, FDD0 ...
FDEF) are as invalid as surrogates. No loop over characters: a string may be 64 MiB of escapes.
"""

from __future__ import annotations

import json
import re
from typing import Final

_TEXT_LIMIT: Final = 1023  # bytes of a fault's text; QEMU formats it into a buffer of 1024


class ParseFault(Exception):
    """What is wrong with a token: the text after "JSON parse error, ", which may hold raw input bytes."""

    def __init__(self, text: bytes) -> None:
        super().__init__(text)
        self.text = readable(text[:_TEXT_LIMIT])


_BACKSLASH: Final = ord("\\")


def decode_string(token: bytes) -> str:
    """Read a string token, quotes included; raise ParseFault for the first fault in it."""
    if token.isascii() and _BACKSLASH not in token:
        return token[1:-1].decode("ascii")
    end = len(token) - 1
    good_to = _end_of_good_escapes(token, end) if _BACKSLASH in token else end
    text = _decode_utf8(token[1:good_to])
    if text is None:
        raise ParseFault(b"invalid UTF-8 sequence in string")
    if good_to < end:
        raise _bad_escape(token, good_to)
    return _unescape(text) if "\\" in text else text


def readable(data: bytes) -> str:
    """Read bytes as QEMU prints them: each bad UTF-8 sequence as one U+FFFD."""
    if data.isascii():
        return data.decode("ascii")
    return "".join("\ufffd" if (text := _decode_utf8(unit)) is None else text for unit in re.findall(_UTF8_UNIT, data))


def _end_of_good_escapes(token: bytes, end: int) -> int:
    """Where the first bad escape begins, or `end`."""
    alone = token.replace(b"\\\\", b"__")  # from now on every backslash begins an escape
    match = re.compile(_BAD_ESCAPE).search(alone, 1, end)
    return end if match is None else match.start()


# The patterns are compiled when first needed, which is rare.
# Without possessive quantifiers, which match wrongly before Python 3.11.5 (gh-106052).
_BAD_ESCAPE: Final = rb"""(?sx) \\ (?!
             [bfnrt"'/]
           | u (?! [dD][89a-fA-F] | [fF][dD][d-eD-E] | [fF]{3}[e-fE-F] ) [0-9a-fA-F]{4}
           | u (?! ..[37bfBF][fF] \\u[dD][fF]{2}[e-fE-F] ) [dD][89abAB][0-9a-fA-F]{2} \\u[dD][c-fC-F][0-9a-fA-F]{2}
           | (?<= \\u[dD][89abAB].. \\ ) u[dD][c-fC-F]
         )"""

# A code point that is not a character, in UTF-8.
_NON_CHARACTER: Final = rb"\xef(?:\xb7[\x90-\xaf]|\xbf[\xbe\xbf])|[\xf0-\xf4][\x8f\x9f\xaf\xbf]\xbf[\xbe\xbf]"

# One unit of (possibly bad) UTF-8: a lead byte with the continuation bytes it requires, as far as present.
_UTF8_UNIT: Final = (
    rb"[\x00-\x7f]+|[\xc0-\xdf][\x80-\xbf]?|[\xe0-\xef][\x80-\xbf]{0,2}|[\xf0-\xf7][\x80-\xbf]{0,3}"
    rb"|[\xf8-\xfb][\x80-\xbf]{0,4}|[\xfc-\xfd][\x80-\xbf]{0,5}|[\x80-\xbf\xfe\xff]"
)


def _decode_utf8(data: bytes) -> str | None:
    """Read modified UTF-8; None if it is bad."""
    if data.isascii():
        return data.decode("ascii")
    try:
        text = data.replace(b"\xc0\x80", b"\0").decode("utf-8")
    except UnicodeDecodeError:
        return None
    return None if re.search(_NON_CHARACTER, data) else text


def _unescape(text: str) -> str:
    """Undo good escapes with the json module, which does not know \\' and wants every " escaped."""
    text = text.replace("\\\\", "\\u005c")  # from now on every backslash begins an escape
    text = text.replace('\\"', '"').replace("\\'", "'").replace('"', '\\"')
    unescaped: str = json.loads(f'"{text}"', strict=False)
    return unescaped


def _bad_escape(token: bytes, at: int) -> ParseFault:
    """Say what is wrong with the escape at `at`; \\u is quoted with 6 bytes, a surrogate pair with 12."""
    if token[at + 1 : at + 2] != b"u":
        return ParseFault(b"invalid escape sequence in string")
    length = 12 if re.compile(_SURROGATE_PAIR).match(token, at) else 6
    return ParseFault(token[at : at + length] + b" is not a valid Unicode character")


_SURROGATE_PAIR: Final = rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
