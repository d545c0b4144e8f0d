"""Which characters QEMU lets into strings, over the whole of Unicode."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gmemd.qmp.strings import ParseFault, decode_string, readable


def is_character(code: int) -> bool:
    """Neither a surrogate nor one of the 66 non-characters."""
    return not (0xD800 <= code <= 0xDFFF or 0xFDD0 <= code <= 0xFDEF or code & 0xFFFE == 0xFFFE)


def samples() -> Iterator[int]:
    """Some of the first plane, all around its holes, and of the others every block of 1024 at its edges."""
    yield from range(0, 0xD700, 0x37)
    yield from range(0xD700, 0xE100, 3)
    yield from range(0xFD00, 0x10000)
    for block in range(0x10000, 0x110000, 0x400):
        yield from (block + offset for offset in (0, 1, 0x1FE, 0x1FF, 0x2FE, 0x3FD, 0x3FE, 0x3FF))


def escaped(code: int) -> str:
    if code < 0x10000:
        return f"\\u{code:04x}"
    return f"\\u{0xD800 + ((code - 0x10000) >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04X}"


def faults(tokens: dict[int, bytes]) -> dict[int, str]:
    """What is said of the tokens that are refused; the others must be read as they are."""
    out = {}
    for code, token in tokens.items():
        try:
            value = decode_string(token)
        except ParseFault as fault:
            out[code] = fault.text
        else:
            assert chr(code) == value
    return out


def test_escaped_characters() -> None:
    r"""Every \uXXXX and every pair of them is read, but for lone surrogates and non-characters."""
    tokens = {code: f'"{escaped(code)}"'.encode() for code in samples()}
    refused = {code: escaped(code) + " is not a valid Unicode character" for code in tokens if not is_character(code)}
    assert refused == faults(tokens)


def test_raw_characters() -> None:
    """The same characters are read in UTF-8."""
    tokens = {code: b"'%b'" % chr(code).encode("utf-8", "surrogatepass") for code in samples() if code > 0x7F}
    refused = {code: "invalid UTF-8 sequence in string" for code in tokens if not is_character(code)}
    assert refused == faults(tokens)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"plain", "plain"),
        ("é€😀".encode(), "é€😀"),
        (b"\xc0\x80", "\0"),
        (b"\x80\xbf", "\ufffd\ufffd"),
        (b"\xc1\xbf|\xe0\x80\x80|\xf0\x80\x80\x80", "\ufffd|\ufffd|\ufffd"),
        (b"\xed\xa0\x80\xed\xb0\x80", "\ufffd\ufffd"),
        (b"\xef\xbf\xbf\xef\xb7\x90\xf0\x9f\xbf\xbe", "\ufffd" * 3),
        (b"\xe2\x82\xe2\x82\xac\xe2", "\ufffd€\ufffd"),
        (b"\xf8\x88\x80\x80\x80\xfc\x80\x80\x80\x80\x80\xfe\xff", "\ufffd" * 4),
    ],
)
def test_readable_puts_one_replacement_for_each_bad_sequence(data: bytes, text: str) -> None:
    """A bad sequence is a lead byte with the continuation bytes it asks for, as far as they come."""
    assert text == readable(data)
