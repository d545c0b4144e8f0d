"""Compare what came with what was recorded: equal lines, except where "norm" names what cannot be equal.

One rule of "norm" is one function here that brings both sides to a form in which they must be equal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from tests.conformance.replay import Case, Result, Step, recorded_lines
from tests.conformance.schema_slice import schema_slice

IN_SCOPE = frozenset([  # the commands whose presence was recorded
    "add-fd", "closefd", "getfd", "object-add", "object-del", "qmp_capabilities", "qom-get", "qom-list",
    "qom-list-properties", "qom-list-types", "qom-set", "query-commands", "query-fdsets", "query-kvm",
    "query-memdev", "query-name", "query-qmp-schema", "query-status", "query-uuid", "query-version", "quit",
    "remove-fd", "yank"])
KEYS = ("id", "name", "fdset-id")  # what tells the entries of a list apart


def differences(case: Case, results: list[Result]) -> Iterator[str]:
    """Give one text for each step that came out otherwise than recorded."""
    numbers: tuple[dict[str, str], dict[str, str]] = {}, {}
    for index, (step, result) in enumerate(zip(case["steps"], results, strict=True)):
        recorded = Result(recorded_lines(step), step.get("closed", False), step.get("value"))
        want, got = (normal(step, r, n, ordered=case["server"] == "new")
                     for r, n in zip((recorded, result), numbers, strict=True))
        if want != got:
            sent = step.get("text") or step.get("hex") or step.get("do") or "(generated)"
            yield f"step {index}: {sent[:300]!r}\n  recorded {_short(want)}\n  came     {_short(got)}"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) < 3000 else f"{text[:1500]} ... {text[-1500:]}"


def normal(step: Step, result: Result, numbers: dict[str, str], *, ordered: bool
           ) -> tuple[object, bool, int | None]:
    """Bring a result to the form that is compared.

    `numbers` carries the fd numbers of the case.
    `ordered`: the order of hash tables counts too, because their history is the case's own.
    """
    lines: Any = result.lines
    for norm in sorted(step.get("norm", ()), key=lambda norm: norm != "fds"):  # numbers before any sorting
        name, _, argument = norm.partition(":")
        lines = NORMS["list" if name == "set" and ordered else name](lines, argument, numbers)
    return lines, result.closed, result.value


def _masked(pattern: str, replacement: str) -> Callable[[Any, str, Any], list[str]]:
    compiled = re.compile(pattern)
    return lambda lines, _argument, _numbers: [compiled.sub(replacement, line) for line in lines]


def _fds(lines: list[str], _argument: str, numbers: dict[str, str]) -> list[str]:
    """Each fd number becomes the ordinal of its first appearance in the case."""
    def ordinal(match: re.Match[str]) -> str:
        return match[1] + numbers.setdefault(match[2], str(len(numbers)))

    return [re.sub(r'("fd": |, fd:)(\d+)', ordinal, line) for line in lines]


def _answer(lines: list[str]) -> Any:
    """The value of a single successful answer, else None."""
    if len(lines) != 1 or not lines[0].startswith('{"return": '):
        return None
    return json.loads(lines[0])["return"]


def _list(lines: list[str], _argument: str, _numbers: object) -> list[str]:
    """The entries of a list, their members as written, without QEMU's monitor object."""
    value = _answer(lines)
    if not isinstance(value, list):
        return lines
    return [json.dumps(entry) for entry in value if not _is_monitor(entry)]


def _is_monitor(entry: Any) -> bool:
    return any(str(entry.get(key)).startswith("compat_monitor") for key in KEYS)


def _root(lines: list[str], _argument: str, _numbers: object) -> list[str]:
    """Of the root of the tree only what every server of the slice has (written by "set" before)."""
    return [line for line in lines if json.loads(line).get("name") in ("type", "objects")] or lines


def _commands(lines: Any, _argument: str, _numbers: object) -> Any:
    if lines and isinstance(lines[0], list):
        return lines[0]
    value = _answer(lines)
    return lines if value is None else sorted(c["name"] for c in value if c["name"] in IN_SCOPE)


def _schema(lines: Any, name: str, _numbers: object) -> Any:
    """The description of one command or event, the order of members and values apart."""
    value = lines[0] if lines and isinstance(lines[0], dict) else schema_slice(_answer(lines) or [], name)
    return _unordered(value)


def _unordered(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unordered(item) for key, item in value.items()}
    if isinstance(value, list):
        return sorted((_unordered(item) for item in value), key=lambda item: json.dumps(item, sort_keys=True))
    return value


NORMS: dict[str, Callable[[Any, str, dict[str, str]], Any]] = {
    "version": _masked(r'("(?:micro|minor|major)": )\d+|("package": )"[^"]*"', r"\1\2#"),
    "time": _masked(r'("(?:seconds|microseconds)": )\d+', r"\1#"),
    "kvm": _masked(r'("(?:enabled|present)": )(?:true|false)', r"\1#"),
    "pretty": lambda lines, _argument, _numbers: lines,
    "any-order": lambda lines, _argument, _numbers: sorted(lines),
    "fds": _fds,
    "list": _list,
    "set": lambda lines, argument, numbers: sorted(_list(lines, argument, numbers)),
    "root": _root,
    "commands": _commands,
    "schema": _schema,
}
