"""QAPI text → expressions: reads files, follows includes and pragmas, collects documentation.

The language (docs/devel/qapi-code-gen of QEMU, "Schema syntax"): JSON-like expressions with single-quoted
strings and no numbers or null, comments from `#` to the end of the line, documentation between two lines `##`.
A top-level expression is an object; `include` and `pragma` are obeyed here, the rest is handed on unjudged.

With the pragma `gmemd-extensions` a string may also hold an escaped single quote.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from .qapi_doc import Doc, DocError, parse_doc


@dataclass(frozen=True)
class Where:
    """A line of a file, for messages."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class QapiError(Exception):
    """The schema is wrong; the text is "FILE:LINE: what is wrong"."""

    def __init__(self, where: Where, text: str) -> None:
        super().__init__(f"{where}: {text}")
        self.where = where
        self.text = text


@dataclass
class Pragma:
    """What pragmas have switched on; one for a main file and all it includes."""

    doc_required: bool = False
    gmemd_extensions: bool = False
    command_name_exceptions: set[str] = field(default_factory=set)
    command_returns_exceptions: set[str] = field(default_factory=set)
    documentation_exceptions: set[str] = field(default_factory=set)
    member_name_exceptions: set[str] = field(default_factory=set)

    def set(self, where: Where, name: str, value: Any) -> None:
        """Obey one member of a pragma expression."""
        attribute = name.replace("-", "_")
        if attribute not in self.__dataclass_fields__ or "_" in name:
            raise QapiError(where, f"unknown pragma '{name}'")
        if isinstance(getattr(self, attribute), bool):
            if not isinstance(value, bool):
                raise QapiError(where, f"pragma '{name}' must be boolean")
            setattr(self, attribute, value)
            return
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise QapiError(where, f"pragma '{name}' must be a list of strings")
        getattr(self, attribute).update(value)


@dataclass(frozen=True)
class Expression:
    """A definition as written, its documentation, and the file (module) it stands in."""

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
    free_docs: list[tuple[str, Doc]] = field(default_factory=list)  # module, text between definitions


_BLANKS = re.compile(r"[ \t\r\f\v]+")
_STRING_RUN = re.compile(r"[^'\\\n]*")
_STRAY = re.compile(r"[^\[\]{}:,\s']+")


class _Tokens:
    """The tokens of one file; `kind` is one of { } [ ] : , ' t f ## or None at the end."""

    def __init__(self, text: str, file: str, pragma: Pragma) -> None:
        self._text = text if text.endswith("\n") else text + "\n"
        self._at = 0
        self._file = file
        self._pragma = pragma
        self.line = 1
        self.kind: str | None = None
        self.value: Any = None
        self._start = 0
        self.next()

    def fail(self, text: str) -> NoReturn:
        raise QapiError(Where(self._file, self.line), text)

    def next(self) -> None:
        """Go on to the next token; comments are skipped, documentation marks are not."""
        while True:
            blanks = _BLANKS.match(self._text, self._at)
            if blanks:
                self._at = blanks.end()
            if self._at >= len(self._text):
                self.kind, self.value = None, None
                return
            char = self._text[self._at]
            if char == "\n":
                self._at += 1
                self.line += self._at < len(self._text)  # the last line's end begins no line
            elif char == "#" and not self._text.startswith("##", self._at):
                self._at = self._text.index("\n", self._at)
            else:
                self._read(char)
                return

    def _read(self, char: str) -> None:
        self._start = self._at
        if char == "#":
            self.kind, self.value = "##", None
        elif char in "{}[]:,":
            self.kind, self.value = char, None
            self._at += 1
        elif char == "'":
            self.kind, self.value = "'", self._read_string()
        elif self._text.startswith("true", self._at):
            self.kind, self.value = "t", True
            self._at += 4
        elif self._text.startswith("false", self._at):
            self.kind, self.value = "f", False
            self._at += 5
        else:
            match = _STRAY.match(self._text, self._at)
            self.fail(f"stray '{match.group() if match else char}'")

    def _read_string(self) -> str:
        parts = []
        at = self._at + 1
        while True:
            match = _STRING_RUN.match(self._text, at)
            assert match
            parts.append(match.group())
            at = match.end()
            if self._text[at] == "'":
                break
            if self._text[at] == "\n":
                self.fail('missing terminating "\'"')
            escaped = self._text[at + 1]
            if escaped != "\\" and not (escaped == "'" and self._pragma.gmemd_extensions):
                self.fail(f"unknown escape \\{escaped}")
            parts.append(escaped)
            at += 2
        self._at = at + 1
        string = "".join(parts)
        if not string.isascii() or not string.isprintable():
            self.fail("funny character in string")
        return string

    def take_doc(self) -> list[tuple[int, str]]:
        """Return the lines between two `##` with their numbers and go on behind them."""
        lines: list[tuple[int, str]] = []
        end = self._text.index("\n", self._at)
        if self._text[self._at : end].rstrip() != "##":
            self.fail("junk after '##' at start of documentation comment")
        while True:
            self._at = end + 1
            self.line += 1
            end = self._text.find("\n", self._at)
            line = self._text[self._at : end].lstrip() if end >= 0 else ""
            if end >= 0 and not line:
                continue  # blank lines may part the lines of a block
            if not line.startswith("#"):
                self.line -= 1
                self.fail("documentation comment must end with '##'")
            if line.startswith("##"):
                if line.rstrip() != "##":
                    self.fail("junk after '##' at end of documentation comment")
                break
            if line[1:2] not in ("", " "):
                self.fail("missing space after #")
            lines.append((self.line, line[2:].rstrip()))
        self._at = end
        self.next()
        return lines


class _File:
    """Reads one file into a Source."""

    def __init__(self, path: Path, shown: str, source: Source, parents: tuple[Path, ...]) -> None:
        self._path = path
        self._shown = shown
        self._source = source
        self._parents = (*parents, path.resolve())

    def read(self, text: str) -> None:
        self._tokens = tokens = _Tokens(text, self._shown, self._source.pragma)
        doc: tuple[Where, Doc] | None = None
        while tokens.kind is not None:
            where = Where(self._shown, tokens.line)
            if tokens.kind == "##":
                self._unused(doc)
                doc = (where, self._doc(where))
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

    def _doc(self, where: Where) -> Doc:
        try:
            return parse_doc(self._tokens.take_doc())
        except DocError as error:
            raise QapiError(Where(where.file, error.line), error.text) from None

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
        tokens.next()
        if tokens.kind == "}":
            tokens.next()
            return members
        while True:
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
            if tokens.kind == "}":
                tokens.next()
                return members
            if tokens.kind != ",":
                tokens.fail("expected ',' or '}'")
            tokens.next()

    def _list(self) -> list[Any]:
        tokens = self._tokens
        items: list[Any] = []
        tokens.next()
        if tokens.kind == "]":
            tokens.next()
            return items
        while True:
            items.append(self._value())
            if tokens.kind == "]":
                tokens.next()
                return items
            if tokens.kind != ",":
                tokens.fail("expected ',' or ']'")
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


def read_file(
    path: Path, source: Source, included_at: Where | None = None, parents: tuple[Path, ...] = ()
) -> None:
    """Read the file and all it includes into `source`; raise QapiError."""
    shown = str(path)
    source.modules.append(shown)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or str(error)) if isinstance(error, OSError) else "not UTF-8"
        raise QapiError(
            included_at or Where(shown, 1), f"can't read schema file '{path}': {reason}"
        ) from None
    _File(path, shown, source, parents).read(text)
