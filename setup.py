"""Building gmemd: in pure Python or, with GMEMD_COMPILE=1 in the environment, with its hot path compiled by mypyc.

Everything else about the package is in pyproject.toml. A compiled module is the same file, with an extension module
beside it that Python prefers.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from setuptools import setup

MYPY = "mypy>=2.4"

# What requests and replies pass through.
COMPILED = (
    "gmemd/backends/base.py",
    "gmemd/backends/file.py",
    "gmemd/backends/guest_memfd.py",
    "gmemd/backends/memfd.py",
    "gmemd/backends/ram.py",
    "gmemd/backends/sealed.py",
    "gmemd/backends/shm.py",
    "gmemd/changes/change.py",
    "gmemd/changes/grouped.py",
    "gmemd/changes/notes.py",
    "gmemd/changes/settling.py",
    "gmemd/changes/steps.py",
    "gmemd/commands/dispatch.py",
    "gmemd/commands/memdev.py",
    "gmemd/memory/piece.py",
    "gmemd/objects/container.py",
    "gmemd/objects/names.py",
    "gmemd/objects/records.py",
    "gmemd/objects/trial.py",
    "gmemd/observe/counters.py",
    "gmemd/observe/log.py",
    "gmemd/persist/batch.py",
    "gmemd/persist/fdstore.py",
    "gmemd/persist/notify.py",
    "gmemd/persist/record.py",
    "gmemd/persist/registry.py",
    "gmemd/qmp/encode.py",
    "gmemd/qmp/ghashtable.py",
    "gmemd/qmp/lexer.py",
    "gmemd/qmp/parser.py",
    "gmemd/qmp/session.py",
    "gmemd/qmp/stream.py",
    "gmemd/qmp/strings.py",
    "gmemd/schema/accept.py",
    "gmemd/schema/validate.py",
    "gmemd/server/inbox.py",
    "gmemd/server/ledger.py",
    "gmemd/server/monitor.py",
    "gmemd/server/outgoing.py",
    "gmemd/server/selector.py",
    "gmemd/server/turns.py",
)


def wanted(value: str) -> bool:
    """Whether GMEMD_COMPILE asks for compiled modules."""
    if value not in ("", "0", "1"):
        raise SystemExit(f"GMEMD_COMPILE is 1, 0 or empty, not '{value}'")
    return value == "1"


def compiled() -> dict[str, Any]:
    """What setup() is told for a compiled build: the extension modules, or that they need mypy, which is not there yet.

    The types of other packages are not needed; script/test checks with them.
    """
    try:
        from mypyc.build import mypycify
    except ImportError:
        return {"setup_requires": [MYPY]}
    options = ["--config-file=", "--follow-imports=silent", "--ignore-missing-imports",
               "--python-version={}.{}".format(*sys.version_info)]
    return {"ext_modules": mypycify([*options, *COMPILED], group_name="gmemd", opt_level="2", debug_level="0")}


setup(**compiled() if wanted(os.environ.get("GMEMD_COMPILE", "")) else {})
