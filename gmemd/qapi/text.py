"""QAPI text → expressions: reads files, follows includes and pragmas, collects documentation.

The language (docs/devel/qapi-code-gen of QEMU, "Schema syntax"): JSON-like expressions with single-quoted
strings and no numbers or null, comments from `#` to the end of the line, documentation between two lines `##`.
A top-level expression is an object; `include` and `pragma` are processed here, the rest is passed on unchecked.

With the pragma `gmemd-extensions` a string may also hold an escaped single quote.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gmemd.qapi.doc import Doc, parse_doc
from gmemd.qapi.tokens import Pragma, QapiError, Tokens, Where


@dataclass(frozen=True)
class Expression:
    """A definition as written, its documentation, and the file (module) it is in."""

    value: dict[str, Any]
    where: Where
    doc: Doc | None
    module: str


@dataclass
class Source:
    """All files reached from one: definitions in order of reading, modules in order of first mention."""

    pragma: Pragma = field(default_factory=Pragma)
    expressions: list[Expression] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    free_docs: list[tuple[str, Doc]] = field(default_factory=list)  # module, free text


class _File:
    """Reads one file into a Source."""

    def __init__(self, path: Path, shown: str, source: Source, parents: tuple[Path, ...]) -> None:
        self._path = path
        self._shown = shown
        self._source = source
        self._parents = (*parents, path.resolve())

    def read(self, text: str) -> None:
        self._tokens = tokens = Tokens(text, self._shown, self._source.pragma)
        doc: tuple[Where, Doc] | None = None
        while tokens.kind is not None:
            where = Where(self._shown, tokens.line)
            if tokens.kind == "##":
                self._unused(doc)
                doc = (where, parse_doc(tokens.take_doc()))
                if doc[1].symbol is None:
                    self._source.free_docs.append((self._shown, doc[1]))
                continue
            if tokens.kind != "{":
                tokens.fail("expected an object at top level")
            value = self._object()
            if "include" in value:
                self._unused(doc)
                self._include(value, where)
            elif "pragma" in value:
                self._unused(doc)
                self._pragma(value, where)
            else:
                self._define(value, where, doc)
            doc = None
        self._unused(doc)

    @staticmethod
    def _unused(doc: tuple[Where, Doc] | None) -> None:
        if doc and doc[1].symbol is not None:
            raise QapiError(doc[0], f"documentation for '{doc[1].symbol}' is not followed by the definition")

    def _define(self, value: dict[str, Any], where: Where, doc: tuple[Where, Doc] | None) -> None:
        if doc and doc[1].symbol is None:
            raise QapiError(doc[0], "definition documentation required")
        self._source.expressions.append(Expression(value, where, doc[1] if doc else None, self._shown))

    def _pragma(self, value: dict[str, Any], where: Where) -> None:
        if len(value) != 1:
            raise QapiError(where, "invalid 'pragma' directive")
        if not isinstance(value["pragma"], dict):
            raise QapiError(where, "value of 'pragma' must be an object")
        for name, setting in value["pragma"].items():
            self._source.pragma.set(where, name, setting)

    def _include(self, value: dict[str, Any], where: Where) -> None:
        if len(value) != 1:
            raise QapiError(where, "invalid 'include' directive")
        name = value["include"]
        if not isinstance(name, str):
            raise QapiError(where, "value of 'include' must be a string")
        path = self._path.parent / name
        if path.resolve() in self._parents:
            raise QapiError(where, f"inclusion loop for {name}")
        shown = str(path)
        if shown in self._source.modules:
            return
        read_file(path, self._source, where, self._parents)

    def _object(self) -> dict[str, Any]:
        tokens = self._tokens
        members: dict[str, Any] = {}
        for _ in self._each("}"):
            if tokens.kind != "'":
                tokens.fail("expected string or '}'" if not members else "expected string")
            name = tokens.value
            tokens.next()
            if tokens.kind != ":":
                tokens.fail("expected ':'")
            tokens.next()
            if name in members:
                tokens.fail(f"duplicate key '{name}'")
            members[name] = self._value()
        return members

    def _list(self) -> list[Any]:
        return [self._value() for _ in self._each("]")]

    def _each(self, end: str) -> Iterator[None]:
        """Yield at the start of each item; at the end the position is after the closing bracket."""
        tokens = self._tokens
        tokens.next()
        if tokens.kind == end:
            tokens.next()
            return
        while True:
            yield
            if tokens.kind == end:
                tokens.next()
                return
            if tokens.kind != ",":
                tokens.fail(f"expected ',' or '{end}'")
            tokens.next()

    def _value(self) -> Any:
        tokens = self._tokens
        if tokens.kind == "{":
            return self._object()
        if tokens.kind == "[":
            return self._list()
        if tokens.kind not in ("'", "t", "f"):
            tokens.fail("expected '{', '[', string, or boolean")
        value = tokens.value
        tokens.next()
        return value


def read_file(path: Path, source: Source, included_at: Where | None = None, parents: tuple[Path, ...] = ()) -> None:
    """Read the file and all it includes into `source`; raise QapiError."""
    shown = str(path)
    source.modules.append(shown)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else "not UTF-8"
        raise QapiError(included_at or Where(shown, 1), f"can't read schema file '{path}': {reason}") from None
    _File(path, shown, source, parents).read(text)
