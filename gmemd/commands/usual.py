"""The commands that most clients use, besides those of control.py: loaded right after the start, before the rest."""

from __future__ import annotations

from types import ModuleType
from typing import Final

from gmemd.changes import grouped  # noqa: F401  # it and the next two are for what is created at its first use
from gmemd.commands import fds, lease, memdev, outlook, properties, qom, shelf, status  # noqa: F401

MODULES: Final[tuple[ModuleType, ...]] = (fds, lease, memdev, properties, qom, status)
