"""`python -m gmemd.cli.manual`: derive docs/man, and the verbs in docs/gmemctl.md, from the parsers.

`--write` writes them, `--check` lists the stale ones and exits with 1.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from gmemd.cli import gmemctl, gmemd
from gmemd.cli.parser import make_parser, options_of, usage_of, verbs_of
from gmemd.kubernetes import main as dra

DOCS = Path(__file__).parents[2] / "docs"
MAN = DOCS / "man"
_GMEMCTL_FILES = (("GMEMD_SOCKET", "the server's socket, where --socket is not given"),)
_GMEMD_FILES = (("/run/gmemd/qmp.sock", "the socket, as root"),
                ("$XDG_RUNTIME_DIR/gmemd/qmp.sock", "the socket, otherwise"))
_DRA_FILES = (("/var/lib/kubelet/plugins_registry", "where the kubelet finds the driver"),
              ("/run/gmemd/claims/UID/qmp.sock", "the socket of a claim"))


def pages() -> dict[Path, str]:
    """What the pages must contain, by path."""
    parser = make_parser(gmemctl.VERBS)
    return {MAN / "gmemctl.1": _page(parser, 1, "control gmemd, or any QMP server", _GMEMCTL_FILES),
            MAN / "gmemd.8": _page(gmemd.make_parser(), 8, "own guest memory and speak QMP", _GMEMD_FILES),
            MAN / "gmemd-dra.8": _page(dra.make_parser(), 8, "let Kubernetes allocate guest memory", _DRA_FILES),
            DOCS / "gmemctl.md": _with_verbs((DOCS / "gmemctl.md").read_text(), parser)}


def _with_verbs(page: str, parser: argparse.ArgumentParser) -> str:
    """The page with its first table, that of the verbs, generated again."""
    rows = "".join(f"| `{usage_of(name, sub).replace('|', ' or ')}` | {sub.description} |\n"
                   for name, sub in verbs_of(parser).items())
    return re.sub(r"(?<=\n\|---\|---\|\n)(\|.*\n)*", lambda _: rows, page, count=1)


def _page(parser: argparse.ArgumentParser, section: int, purpose: str, files: tuple[tuple[str, str], ...]) -> str:
    name = parser.prog
    other = ("gmemd", 8) if name == "gmemctl" else ("gmemctl", 1)
    lines = [f".TH {name.upper()} {section} \"\" gmemd", ".SH NAME", f"{name} \\- {purpose}", ".SH SYNOPSIS",
             f".B {name}", "[\\fIOPTION\\fR]..." + (" \\fIVERB\\fR [\\fIWORD\\fR]..." if name == "gmemctl" else ""),
             ".SH DESCRIPTION", _text(parser.description), ".SH OPTIONS", *_options(parser)]
    if name == "gmemctl":
        lines.append(".SH VERBS")
        for verb, sub in verbs_of(parser).items():
            lines += [f".SS {_text(usage_of(verb, sub))}", _text(sub.description) + "."]
            lines += _options(sub, leave=options_of(parser))
            lines += [".PP", ".nf", *(f"\\fBgmemctl {_text(example)}\\fR" for example in gmemctl.VERBS[verb].examples),
                      ".fi"]
        lines += [".SH ENVIRONMENT"]
    else:
        lines += [".SH FILES"]
    for what, text in files:
        lines += [".TP", f".B {_text(what)}", _text(text)]
    lines += [".SH NOTES", _text(parser.epilog), ".SH SEE ALSO", f".BR {other[0]} ({other[1]})"]
    return "\n".join(lines) + "\n"


def _options(parser: argparse.ArgumentParser, leave: list[argparse.Action] | None = None) -> Iterator[str]:
    known = {flag for action in leave or () for flag in action.option_strings}
    for action in options_of(parser):
        if known.isdisjoint(action.option_strings):
            value = ""
            if action.nargs != 0:
                shown = action.metavar or "|".join(map(str, action.choices or [action.dest.upper()]))
                value = f" \\fI{_text(str(shown))}\\fR"
            yield from (".TP", ", ".join(f"\\fB{_text(flag)}\\fR" for flag in action.option_strings) + value,
                        _text(action.help))


def _text(text: str | None) -> str:
    """Text for roff: no character of it is a request."""
    shown = (text or "").replace("\\", "\\e").replace("-", "\\-")
    return "\\&" + shown if shown.startswith((".", "'")) else shown


def stale() -> list[Path]:
    """The pages that do not match the parsers."""
    return [path for path, text in pages().items() if not path.is_file() or path.read_text() != text]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m gmemd.cli.manual", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the pages")
    parser.add_argument("--check", action="store_true", help="fail if one is stale")
    options = parser.parse_args(argv)
    if options.write:
        MAN.mkdir(exist_ok=True)
        for path, text in pages().items():
            path.write_text(text)
    for path in stale():
        print(f"{path} is stale: run python -m gmemd.cli.manual --write", file=sys.stderr)
    return 1 if stale() else 0


if __name__ == "__main__":
    sys.exit(main())
