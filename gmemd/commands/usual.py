"""The commands that most clients use, besides those of control.py: loaded right after the start, before the rest."""

from __future__ import annotations

from types import ModuleType
from typing import Final

from gmemd.commands import fds, lease, memdev, properties, qom, status

MODULES: Final[tuple[ModuleType, ...]] = (fds, lease, memdev, properties, qom, status)
