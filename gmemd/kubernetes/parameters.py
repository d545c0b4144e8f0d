"""Opaque parameters of a claim: those of its class, then its own, checked by parameters.json.

A name in the parameters of a class is the administrator's, and names a snapshot or an object of the house. A name in
those of a claim is anybody's: it is looked for among what belongs to the claim's namespace, as NAMESPACE.NAME.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, Final

from jsonschema import Draft202012Validator

from gmemd.errors import QmpError

ORIGINS: Final = ("restore", "clone", "copy")  # what the memory comes from, if it is not new
_DEFAULTS: Final = {"type": "memfd", "onRelease": "delete"}
_ENVELOPE: Final = ("apiVersion", "kind")


def merged(configs: list[dict[str, Any]], driver: str, request: str, namespace: str) -> dict[str, Any]:
    """The parameters for a request, by name or NAME/SUBREQUEST; `configs` is status.allocation.devices.config.

    A member of a later one replaces that of an earlier one. QmpError in QEMU's words if one is wrong.
    """
    names = {"", request, request.partition("/")[0]}
    found: dict[str, Any] = dict(_DEFAULTS)
    for config in sorted(configs, key=lambda one: one.get("source") == "FromClaim"):
        opaque = config.get("opaque") or {}
        if opaque.get("driver") == driver and names & set(config.get("requests") or [""]):
            given: Any = opaque.get("parameters")
            check(given)
            found |= given if config.get("source") == "FromClass" else _of_namespace(given, namespace)
    origins = [name for name in ORIGINS if name in found]
    if len(origins) > 1:
        raise QmpError(f"'{origins[0]}' and '{origins[1]}' exclude each other")
    return {name: value for name, value in found.items() if name not in _ENVELOPE}


def check(given: Any) -> None:
    """Raise QmpError if they are not by the schema."""
    error = next(iter(sorted(_validator().iter_errors(given), key=lambda one: len(one.absolute_path))), None)
    if error is not None:
        raise QmpError(f"the claim's parameters: {_words(error)}")


def _of_namespace(given: dict[str, Any], namespace: str) -> dict[str, Any]:
    return {**given, **{name: f"{namespace}.{given[name]}" for name in ORIGINS if name in given}}


def _words(error: Any) -> str:
    """QEMU's sentence for such an error."""
    name = ".".join(map(str, error.absolute_path))
    schema: Any = error.schema
    if error.validator == "additionalProperties":
        return f"Parameter '{next(key for key in error.instance if key not in schema['properties'])}' is unexpected"
    if error.validator == "required":
        return f"Parameter '{next(key for key in schema['required'] if key not in error.instance)}' is missing"
    if error.validator == "type":
        return f"Invalid parameter type for '{name or 'parameters'}', expected: {schema['type']}"
    return f"Parameter '{name}' does not accept value '{error.instance}'"


@cache
def _validator() -> Draft202012Validator:
    return Draft202012Validator(json.loads(Path(__file__).with_name("parameters.json").read_text()))
