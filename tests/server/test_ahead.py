"""What is loaded ahead comes from directories that were opened before, and does not look so afterwards."""

from __future__ import annotations

import subprocess
import sys

from tests.programs import ROOT


def test_modules_appear_to_be_from_their_directories() -> None:
    """By name, packages and modules alike; imports are as they were before."""
    code = """
import os, sys
from gmemd.server.ahead import HeldDirectories
before = sys.getswitchinterval(), list(sys.meta_path)
here = os.path.dirname(os.__file__)
held = HeldDirectories()
with held:
    import wsgiref.headers as module
    import wsgiref as package
    assert module.__file__.startswith("/proc/self/fd/"), module.__file__
for place in (module.__file__, module.__spec__.origin, module.__spec__.loader.path, package.__path__[0],
              package.__spec__.submodule_search_locations[0]):
    assert place.startswith(here), place
assert not [place for place in sys.path_importer_cache if place.startswith("/proc/self/fd/")]
assert (sys.getswitchinterval(), list(sys.meta_path)) == before
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
