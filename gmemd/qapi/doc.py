"""Documentation blocks of QAPI files.

A block that begins with `@NAME:` documents the definition that follows it: an overview, then `@member: text`
entries, `Features:` with entries of their own, and tagged sections (Returns, Errors, Since, ...).
Any other block is free text for the reference page.
QEMU's rules for these blocks became stricter over time; whatever 7.2 accepts is accepted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from gmemd.qapi.tokens import Line, QapiError, Where


@dataclass
class Doc:
    """One block. Texts are paragraphs as written, lines joined by LF."""

    symbol: str | None
    text: str = ""
    members: dict[str, str] = field(default_factory=dict)
    features: dict[str, str] = field(default_factory=dict)
    sections: dict[str, str] = field(default_factory=dict)  # by tag, without the colon
    lines: dict[str, Where] = field(default_factory=dict)  # of "@NAME" or a tag

    @property
    def summary(self) -> str:
        """The first sentence (or line) of the overview."""
        paragraph = " ".join(self.text.split("\n\n", 1)[0].split())
        match = re.match(r"(.*?[.:;])(\s|$)", paragraph)
        return (match.group(1) if match else paragraph).rstrip(".:;")


_ENTRY = re.compile(r"@([^:\s]*):(?: +|$)")
_TAG = re.compile(r"(Returns|Errors|Since|Notes?|Examples?|TODO):(?!:) *")
_REPEATABLE = ("Note", "Notes", "Example", "Examples", "TODO")


def parse_doc(lines: Sequence[Line]) -> Doc:
    """The block made of these lines; QapiError where they are wrong."""
    if lines and lines[0][1].startswith("@"):
        return _Definition(lines).parse()
    for where, text in lines:
        entry = _ENTRY.match(text)
        if entry:
            raise QapiError(where, f"'@{entry.group(1)}:' not allowed in free-form documentation")
    return Doc(None, "\n".join(text for _, text in lines).strip())


def _begins_section(text: str) -> bool:
    return bool(text == "Features:" or _ENTRY.match(text) or _TAG.match(text))


class _Definition:
    """Reads the block of a definition, section by section."""

    def __init__(self, lines: Sequence[Line]) -> None:
        where, first = lines[0]
        if not first.endswith(":"):
            raise QapiError(where, "line should end with ':'")
        if first == "@:":
            raise QapiError(where, "name required after '@'")
        self._doc = Doc(first[1:-1])
        self._lines = lines
        self._at = 1
        self._no_more_members = False
        self._overview: list[str] = []

    def parse(self) -> Doc:
        while self._at < len(self._lines):
            where, text = self._lines[self._at]
            if text == "Features:":
                self._features(where)
            elif _ENTRY.match(text):
                if self._no_more_members:
                    raise QapiError(where, f"description of '{text.partition(':')[0]}:' follows a section")
                self._entries(self._doc.members)
            elif tag := _TAG.match(text):
                self._section(where, tag)
            elif text.startswith("="):
                raise QapiError(where, "unexpected '=' markup in definition documentation")
            else:
                self._overview.append(text)
                self._at += 1
        self._doc.text = "\n".join(line.strip() for line in self._overview).strip()
        return self._doc

    def _features(self, where: Where) -> None:
        if self._doc.features:
            raise QapiError(where, "duplicated 'Features:' line")
        self._at += 1
        while self._at < len(self._lines) and not self._lines[self._at][1]:
            self._at += 1
        self._entries(self._doc.features)
        if not self._doc.features:
            raise QapiError(where, "feature descriptions expected")
        self._no_more_members = True

    def _entries(self, into: dict[str, str]) -> None:
        """Read entries as long as one follows the other."""
        while self._at < len(self._lines):
            where, text = self._lines[self._at]
            entry = _ENTRY.match(text)
            if not entry:
                return
            name = entry.group(1)
            if not name:
                raise QapiError(where, "invalid parameter name")
            if name in into:
                raise QapiError(where, f"'{name}' parameter name duplicated")
            self._doc.lines[f"@{name}"] = where
            into[name] = self._indented(text[entry.end() :])

    def _section(self, where: Where, tag: re.Match[str]) -> None:
        name = tag.group(1)
        known = self._doc.sections
        if name in known and name not in _REPEATABLE:
            raise QapiError(where, f"duplicated '{name}' section")
        self._doc.lines[name] = where
        text = self._indented(tag.string[tag.end() :])
        if not text and name not in _REPEATABLE:
            raise QapiError(where, f"text required after '{name}:'")
        known[name] = f"{known[name]}\n\n{text}" if name in known else text
        self._no_more_members = True

    def _indented(self, first: str) -> str:
        """The rest of an entry or section: its first line, and the indented lines that follow."""
        texts = [first]
        self._at += 1
        least = 0
        while self._at < len(self._lines):
            where, text = self._lines[self._at]
            indent = len(text) - len(text.lstrip())
            if text and not indent:
                if least and texts[-1] and not _begins_section(text):
                    raise QapiError(where, f"unexpected de-indent (expected at least {least} spaces)")
                break
            if text:
                least = least or indent
                if indent < least:
                    raise QapiError(where, f"unexpected de-indent (expected at least {least} spaces)")
            texts.append(text.strip())
            self._at += 1
        return "\n".join(texts).strip()
