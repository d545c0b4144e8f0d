"""QAPI text → tokens, and what every part of the compiler needs: locations, errors, pragmas."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, NoReturn


@dataclass(frozen=True)
class Where:
    """A line of a file, for messages."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


Line = tuple[Where, str]  # of documentation: its place, its text without the `# ` in front


class QapiError(Exception):
    """The schema is wrong; the text is "FILE:LINE: what is wrong"."""

    def __init__(self, where: Where, text: str) -> None:
        super().__init__(f"{where}: {text}")
        self.where = where
        self.text = text


@dataclass
class Pragma:
    """What pragmas have enabled; one for a main file and all files it includes."""

    doc_required: bool = False
    gmemd_extensions: bool = False
    command_name_exceptions: set[str] = field(default_factory=set)
    command_returns_exceptions: set[str] = field(default_factory=set)
    documentation_exceptions: set[str] = field(default_factory=set)
    member_name_exceptions: set[str] = field(default_factory=set)

    def set(self, where: Where, name: str, value: Any) -> None:
        """Apply one member of a pragma expression."""
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


_BLANKS = re.compile(r"[ \t\r\f\v]+")
_STRING_RUN = re.compile(r"[^'\\\n]*")
_STRAY = re.compile(r"[^\[\]{}:,\s']+")


class Tokens:
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
        """Advance to the next token; comments are skipped, documentation marks are not."""
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
                self.line += self._at < len(self._text)  # no line begins after the last one
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

    def take_doc(self) -> list[Line]:
        """The lines between two `##`; the position is then after them."""
        lines: list[Line] = []
        end = self._text.index("\n", self._at)
        if self._text[self._at : end].rstrip() != "##":
            self.fail("junk after '##' at start of documentation comment")
        while True:
            self._at = end + 1
            self.line += 1
            end = self._text.find("\n", self._at)
            line = self._text[self._at : end].lstrip() if end >= 0 else ""
            if end >= 0 and not line:
                continue  # blank lines may separate the lines of a block
            if not line.startswith("#"):
                self.line -= 1
                self.fail("documentation comment must end with '##'")
            if line.startswith("##"):
                if line.rstrip() != "##":
                    self.fail("junk after '##' at end of documentation comment")
                break
            if line[1:2] not in ("", " "):
                self.fail("missing space after #")
            lines.append((Where(self._file, self.line), line[2:].rstrip()))
        self._at = end
        self.next()
        return lines
