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

Line = tuple[int, str]  # number in the file, text without the `# ` in front


class DocError(Exception):
    """The documentation is wrong at `line`."""

    def __init__(self, line: int, text: str) -> None:
        super().__init__(text)
        self.line = line
        self.text = text


@dataclass
class Doc:
    """One block. Texts are paragraphs as written, lines joined by LF."""

    symbol: str | None
    text: str = ""
    members: dict[str, str] = field(default_factory=dict)
    features: dict[str, str] = field(default_factory=dict)
    sections: dict[str, str] = field(default_factory=dict)  # by tag, without the colon
    lines: dict[str, int] = field(default_factory=dict)  # where "@NAME" or a tag is

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
    """The block made of these lines; DocError where they are wrong."""
    if lines and lines[0][1].startswith("@"):
        return _Definition(lines).parse()
    for number, text in lines:
        entry = _ENTRY.match(text)
        if entry:
            raise DocError(number, f"'@{entry.group(1)}:' not allowed in free-form documentation")
    return Doc(None, "\n".join(text for _, text in lines).strip())


def _begins_section(text: str) -> bool:
    return bool(text == "Features:" or _ENTRY.match(text) or _TAG.match(text))


class _Definition:
    """Reads the block of a definition, section by section."""

    def __init__(self, lines: Sequence[Line]) -> None:
        number, first = lines[0]
        if not first.endswith(":"):
            raise DocError(number, "line should end with ':'")
        if first == "@:":
            raise DocError(number, "name required after '@'")
        self._doc = Doc(first[1:-1])
        self._lines = lines
        self._at = 1
        self._no_more_members = False
        self._overview: list[str] = []

    def parse(self) -> Doc:
        while self._at < len(self._lines):
            number, text = self._lines[self._at]
            if text == "Features:":
                self._features(number)
            elif _ENTRY.match(text):
                if self._no_more_members:
                    raise DocError(number, f"description of '{text.partition(':')[0]}:' follows a section")
                self._entries(self._doc.members)
            elif tag := _TAG.match(text):
                self._section(number, tag)
            elif text.startswith("="):
                raise DocError(number, "unexpected '=' markup in definition documentation")
            else:
                self._overview.append(text)
                self._at += 1
        self._doc.text = "\n".join(line.strip() for line in self._overview).strip()
        return self._doc

    def _features(self, number: int) -> None:
        if self._doc.features:
            raise DocError(number, "duplicated 'Features:' line")
        self._at += 1
        while self._at < len(self._lines) and not self._lines[self._at][1]:
            self._at += 1
        self._entries(self._doc.features)
        if not self._doc.features:
            raise DocError(number, "feature descriptions expected")
        self._no_more_members = True

    def _entries(self, into: dict[str, str]) -> None:
        """Read entries as long as one follows the other."""
        while self._at < len(self._lines):
            number, text = self._lines[self._at]
            entry = _ENTRY.match(text)
            if not entry:
                return
            name = entry.group(1)
            if not name:
                raise DocError(number, "invalid parameter name")
            if name in into:
                raise DocError(number, f"'{name}' parameter name duplicated")
            self._doc.lines[f"@{name}"] = number
            into[name] = self._indented(text[entry.end() :])

    def _section(self, number: int, tag: re.Match[str]) -> None:
        name = tag.group(1)
        known = self._doc.sections
        if name in known and name not in _REPEATABLE:
            raise DocError(number, f"duplicated '{name}' section")
        self._doc.lines[name] = number
        text = self._indented(tag.string[tag.end() :])
        if not text and name not in _REPEATABLE:
            raise DocError(number, f"text required after '{name}:'")
        known[name] = f"{known[name]}\n\n{text}" if name in known else text
        self._no_more_members = True

    def _indented(self, first: str) -> str:
        """The rest of an entry or section: its first line, and the indented lines that follow."""
        texts = [first]
        self._at += 1
        least = 0
        while self._at < len(self._lines):
            number, text = self._lines[self._at]
            indent = len(text) - len(text.lstrip())
            if text and not indent:
                if least and texts[-1] and not _begins_section(text):
                    raise DocError(number, f"unexpected de-indent (expected at least {least} spaces)")
                break
            if text:
                least = least or indent
                if indent < least:
                    raise DocError(number, f"unexpected de-indent (expected at least {least} spaces)")
            texts.append(text.strip())
            self._at += 1
        return "\n".join(texts).strip()
