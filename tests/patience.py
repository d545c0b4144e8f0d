"""How long a test waits for what it waits for, before it says that it does not come.

It is for a machine with far more to do than it can: no test takes longer for it, but one that fails.
"""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 180.0  # seconds


def wait_for(found: Callable[[], object]) -> None:
    """Ask until the answer is true."""
    end = time.monotonic() + PATIENCE
    while not found():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.01)
