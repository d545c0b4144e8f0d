"""`python -m gmemd.qapi`: derive qom.json, emulator.json and docs/reference.md from the QAPI source.

`--write` writes them, `--check` lists the stale ones and exits with 1; without either, qom.json is printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from gmemd.qapi.document import json_schema
from gmemd.qapi.entities import Entities
from gmemd.qapi.load import load
from gmemd.qapi.reference import reference

HERE = Path(__file__).parents[1] / "schema"
REFERENCE = HERE.parent.parent / "docs" / "reference.md"


def derived() -> dict[Path, str]:
    """What the derived files must contain, by path."""
    entities = load(HERE / "qapi")
    files = {
        HERE / "qom.json": _document(entities, "A command gmemd understands"),
        HERE / "emulator.json": _document(load(HERE / "qapi/emulator.json"), "A command gmemd-emulator understands"),
    }
    if REFERENCE.parent.is_dir():  # in a clone, not in an installed package
        files[REFERENCE] = reference(entities)
    return files


def _document(entities: Entities, title: str) -> str:
    return json.dumps(json_schema(entities, title=title), indent=1, ensure_ascii=True) + "\n"


def stale() -> list[Path]:
    """The derived files that do not match the source."""
    return [path for path, text in derived().items() if not path.is_file() or path.read_text(encoding="utf-8") != text]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m gmemd.qapi", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the derived files")
    parser.add_argument("--check", action="store_true", help="fail if a derived file is stale")
    options = parser.parse_args(argv)
    if options.write:
        for path, text in derived().items():
            path.write_text(text, encoding="utf-8")
    elif options.check:
        for path in stale():
            print(f"{path} is stale: run python -m gmemd.qapi --write", file=sys.stderr)
        return 1 if stale() else 0
    else:
        print(derived()[HERE / "qom.json"], end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
