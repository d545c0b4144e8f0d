"""The worker's program finds every verb."""

from __future__ import annotations

from importlib import import_module

from gmemd.kernel import program


def test_every_verb_is_found() -> None:
    """The list of verbs is what the worker's modules declare."""
    declared = {verb: name for name in program._MODULES for verb in getattr(import_module(name), "VERBS", {})}
    assert declared == program._VERBS
