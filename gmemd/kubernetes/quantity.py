"""Amounts of bytes as Kubernetes writes them (k8s.io/apimachinery resource.Quantity): 2Gi, 512Mi, 1500M, 1.5Gi, 1e9."""

from __future__ import annotations

import re
from fractions import Fraction

from gmemd.errors import QmpError

_UNITS = {"": 1, **{unit: 1 << 10 * power for power, unit in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"), 1)},
          **{unit: 10 ** (3 * power) for power, unit in enumerate(("k", "M", "G", "T", "P", "E"), 1)},
          "m": Fraction(1, 1000), "u": Fraction(1, 10**6), "n": Fraction(1, 10**9)}
_FORM = re.compile(r"\+?(\d+\.?\d*|\.\d+)(?:(Ki|Mi|Gi|Ti|Pi|Ei|[kMGTPEmun]?)|[eE]([+-]?\d{1,2}))")


def parse(text: str) -> int:
    """Bytes; a part of a byte counts as one, as Quantity.Value does. QmpError if it is not an amount."""
    found = _FORM.fullmatch(str(text))
    if found is None:
        raise QmpError(f"'{text}' is not an amount of memory, as for example 2Gi")
    scale = Fraction(10) ** int(found[3]) if found[3] else Fraction(_UNITS[found[2] or ""])
    return -int(-(Fraction(found[1]) * scale) // 1)


def write(size: int) -> str:
    """The canonical form of a number of bytes, which the API server leaves as it is."""
    unit = ""
    for name in ("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"):
        if size and size % 1024 == 0:
            size, unit = size // 1024, name
    return f"{size}{unit}"
