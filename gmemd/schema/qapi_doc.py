"""Documentation blocks of QAPI files.

A block that begins with `@NAME:` documents the definition that follows it: an overview, then `@member: text`
entries, `Features:` with entries of their own, and tagged sections (Returns, Errors, Since, ...).
Any other block is free text for the reference page.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field


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
    sections: dict[str, str] = field(default_factory=dict)  # by tag without the colon

    @property
    def summary(self) -> str:
        """The first sentence (or line) of the overview."""
        paragraph = " ".join(self.text.split("\n\n", 1)[0].split())
        match = re.match(r"(.*?[.:;])(\s|$)", paragraph)
        return (match.group(1) if match else paragraph).rstrip(".:;")


_ENTRY = re.compile(r"@([^:\s]*):(?:\s+(.*)|$)")
_TAG = re.compile(r"(Returns|Errors|Since|Notes?|Examples?|TODO)(?:::?)(?:\s+(.*)|$)")


class _Parser:
    def __init__(self, symbol: str) -> None:
        self.doc = Doc(symbol)
        self._lines: list[str] = []
        self._store: tuple[dict[str, str] | None, str] = (None, "")
        self._in_features = False

    def line(self, number: int, text: str) -> None:
        entry = _ENTRY.match(text)
        tag = _TAG.match(text)
        if entry:
            into = self.doc.features if self._in_features else self.doc.members
            self._begin(number, into, entry.group(1), entry.group(2))
        elif text == "Features:":
            self.end()
            self._in_features, self._store = True, (self.doc.sections, "Features")
        elif tag:
            self._in_features = False
            self._begin(number, self.doc.sections, tag.group(1), tag.group(2), once=False)
        else:
            self._lines.append(text)

    def _begin(
        self, number: int, into: dict[str, str], name: str, rest: str | None, *, once: bool = True
    ) -> None:
        if once and not name:
            raise DocError(number, "invalid parameter name")
        if once and name in into:
            raise DocError(number, f"'{name}' parameter name duplicated")
        self.end()
        self._store = (into, name)
        self._lines = [rest or ""]

    def end(self) -> None:
        into, name = self._store
        text = "\n".join(line.strip() for line in self._lines).strip()
        if into is None:
            self.doc.text = text
        elif name != "Features":
            into[name] = f"{into[name]}\n{text}" if name in into else text
        self._lines = []


def parse_doc(lines: list[tuple[int, str]]) -> Doc:
    """Return the block made of these (line number, text without `# `); raise DocError."""
    content = [(number, text) for number, text in lines if text]
    if not content or not content[0][1].startswith("@"):
        return Doc(None, "\n".join(text for _, text in lines).strip())
    number, first = content[0]
    if not first.endswith(":"):
        raise DocError(number, "line should end with ':'")
    symbol = first[1:-1]
    if not symbol:
        raise DocError(number, "name required after '@'")
    parser = _Parser(symbol)
    for number, text in lines[lines.index(content[0]) + 1 :]:
        parser.line(number, text)
    parser.end()
    return parser.doc
