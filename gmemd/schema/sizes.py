"""Numbers as QEMU's command line writes them: sizes with suffixes, C integers, ranges.

The rules are those of QEMU since 8.1 (util/cutils.c): `1.5G`, `.5G` and `4096k` are sizes, hexadecimal takes
neither fraction nor suffix, there are no exponents and no octal sizes.
"""

from __future__ import annotations

import re
from typing import Final

_LIMIT: Final = 1 << 64
_UNITS: Final = "bkmgtpe"
_BLANKS: Final = " \t\n\v\f\r"

_HEX = re.compile(r"[ \t\n\v\f\r]*\+?0+x([0-9a-f]+)", re.IGNORECASE | re.ASCII)
_SIZE = re.compile(r"[ \t\n\v\f\r]*\+?([0-9]*)(\.[0-9]*)?([bkmgtpe]?)", re.IGNORECASE | re.ASCII)
_UINT = re.compile(r"[ \t\n\v\f\r]*\+?(0[xX][0-9a-fA-F]+|[0-9]+)", re.ASCII)

MAX_RANGE: Final = 65536  # elements


def parse_size(text: str) -> int | None:
    """The bytes that `text` means, None if it is not a size (or more than 64 bits)."""
    match = _HEX.fullmatch(text)
    if match and text.lstrip(_BLANKS).lstrip("+").lower().startswith("0x"):
        value = int(match.group(1), 16)
        return value if value < _LIMIT else None
    match = _SIZE.fullmatch(text)
    if match is None:
        return None
    digits, fraction, unit = match.group(1), match.group(2) or "", match.group(3).lower()
    if not digits and len(fraction) < 2:
        return None
    whole = int(digits or "0")
    part = float("0" + fraction) if len(fraction) > 1 else 0.0
    if part == 1.0:
        whole, part = whole + 1, 0.0
    shift = 10 * _UNITS.index(unit or "b")
    if whole >= _LIMIT or (shift == 0 and part):
        return None
    fixed = max(int(part * 2.0**64), 1) if part else 0  # 64 bits after the point
    value = ((((whole << 64) + fixed) << shift) + (1 << 63)) >> 64  # 0.5 rounds up
    return value if value < _LIMIT else None


def parse_uint(text: str) -> int | None:
    """The C integer (decimal, 0x..., octal 0...) that `text` is, None if it is not one of 64 bits."""
    match = _UINT.fullmatch(text)
    if match is None:
        return None
    digits = match.group(1)
    try:
        value = int(digits, 8 if digits[0] == "0" and digits.isdigit() else 0)
    except ValueError:  # 08
        return None
    return value if value < _LIMIT else None


def parse_range(text: str) -> range | None:
    """The integers that N or N-M stands for, None if `text` is neither."""
    first = parse_uint(text)
    if first is not None:
        return range(first, first + 1)
    head, minus, tail = text.partition("-")
    low, high = parse_uint(head), parse_uint(tail)
    if not minus or low is None or high is None or not 0 <= high - low < MAX_RANGE:
        return None
    return range(low, high + 1)
