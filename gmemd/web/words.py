"""Values in readable form, as HTML."""

from __future__ import annotations

import time
from html import escape
from typing import Any, Final

UNITS: Final = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")

# Labels of the survival events of query-memdev-status.
EVENTS: Final = {
    "vmm-crash": "VMM crash", "vmm-replaced": "guest goes on in another VMM", "client-disconnect": "client disconnect",
    "gmemd-crash": "gmemd crash", "gmemd-upgrade": "gmemd upgrade", "service-stop": "service stop",
    "soft-reboot": "soft reboot", "kexec": "kexec", "power-loss": "power loss",
}


def size(count: int) -> str:
    """Format a number of bytes with at most three significant digits, as 1.5 GiB."""
    value, unit = float(count), 0
    while value >= 1024 and unit < len(UNITS) - 1:
        value, unit = value / 1024, unit + 1
    text = f"{value:.0f}" if value >= 100 else f"{value:.1f}".removesuffix(".0")
    return f"{text} {UNITS[unit]}"


def exactly(count: int) -> str:
    """The same as HTML that also has the exact number."""
    return f'<data value="{count}" title="{count:,} bytes">{size(count)}</data>'


def percent(part: int, whole: int) -> str:
    """A share, never rounded to 0 or 100 %."""
    if not whole or part in (0, whole):
        return "100 %" if part else "0 %"
    share = 100 * part / whole
    return "< 1 %" if share < 1 else "> 99 %" if share > 99 else f"{share:.0f} %"


def plural(count: int, noun: str, nouns: str = "") -> str:
    """A number with its noun."""
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def moment(when: float) -> str:
    """A time (seconds since the epoch) as HTML, in UTC."""
    utc = time.gmtime(when)
    return (f'<time datetime="{time.strftime("%Y-%m-%dT%H:%M:%SZ", utc)}">'
            f'{time.strftime("%Y-%m-%d", utc)} {time.strftime("%H:%M:%S", utc)}</time>')


def members(value: dict[str, Any]) -> str:
    """The members of an event's data, as HTML."""
    return " ".join(f"<span><i>{escape(str(name))}</i>\u00a0{_member(name, member)}</span>"
                    for name, member in value.items())


def _member(name: str, value: Any) -> str:
    return exactly(value) if name in ("offset", "size") and isinstance(value, int) else escape(str(value)[:200])


def bar(parts: list[tuple[str, int]], whole: int, text: str) -> str:
    """A bar of named parts (CSS class, amount) of a whole, described by `text`."""
    drawn, at = [], 0.0
    for name, amount in parts:
        width = 1000 * amount / whole if whole else 0.0
        drawn.append(f'<rect class="{name}" x="{at:.1f}" width="{width:.1f}" height="10"/>')
        at += width
    return (f'<svg class="bar" viewBox="0 0 1000 10" preserveAspectRatio="none" role="img" aria-label="{escape(text)}">'
            f'{"".join(drawn)}</svg>')
