"""`--object`: QEMU's key=value syntax, or JSON → what Schema.check_object takes."""

from __future__ import annotations

import json
from typing import Any

from gmemd.errors import QmpError


def parse_object(spec: str) -> dict[str, Any]:
    """Return the properties that `spec` gives; raise QmpError."""
    if spec.startswith("{"):
        try:
            given: dict[str, Any] = json.loads(spec)
        except ValueError as exc:
            raise QmpError(f"JSON parse error, {exc}") from exc
        return given
    raise QmpError("key=value is not there yet")
