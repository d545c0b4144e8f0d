"""`gmemd schema compile DIR`: compile a QAPI schema, gmemd's own or a QEMU source tree's, and print it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from gmemd.qapi.document import json_schema
from gmemd.qapi.introspect import introspect
from gmemd.qapi.load import QapiError, load, main_file


def main(argv: Sequence[str] | None = None) -> int:
    """Run `schema ...`; the exit status: 0, 1 when the schema is wrong, 2 for a wrong command line."""
    options = _parser().parse_args(argv)
    try:
        entities = load(main_file(options.dir))
    except QapiError as error:
        print(error, file=sys.stderr)
        return 1
    if not options.introspect:
        print(json.dumps(json_schema(entities), indent=2))
        return 0
    defined = frozenset(options.define)
    config = defined.__contains__ if defined else None
    print(json.dumps(introspect(entities, config=config, mask=not options.unmask), indent=2))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gmemd schema", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    verb = verbs.add_parser("compile", help="print what a schema defines", description=__doc__)
    verb.add_argument("dir", metavar="DIR", type=Path, help="a qapi directory, a source tree or a file")
    verb.add_argument("--introspect", action="store_true",
                      help="print what query-qmp-schema answers instead of a JSON Schema")
    verb.add_argument("--unmask", action="store_true", help="with --introspect: keep the names of types")
    verb.add_argument("-D", "--define", metavar="SYMBOL", action="append", default=[],
                      help="with --introspect: leave out the parts whose 'if' does not hold when exactly "
                           "these symbols are defined (repeat; without it nothing is left out)")
    return parser
