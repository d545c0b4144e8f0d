"""The worker's program finds every verb, and has whatever its modules import."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

from gmemd.kernel import program


def test_every_verb_is_found() -> None:
    """The list of verbs is what the worker's modules declare."""
    declared = {verb: name for name in program._MODULES for verb in getattr(import_module(name), "VERBS", {})}
    assert declared == program._VERBS


def test_the_modules_are_enough() -> None:
    """They import nothing of gmemd's that is not listed: nothing else is there when the package has been replaced."""
    code = "import sys; from importlib import import_module; [import_module(name) for name in sys.argv[1:]];" \
           "print(*(name for name in sys.modules if name.partition('.')[0] == 'gmemd'))"
    done = subprocess.run([sys.executable, "-c", code, *program._MODULES], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) - set(program._MODULES) == set()
