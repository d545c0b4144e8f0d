"""Fuzzing guided by coverage: atheris finds the inputs that fuzz.py tries.

    python -m tests.robustness.guided MESSAGES [FOLDER]

It ends when that many messages were answered, or where something is wrong; FOLDER then has the input. With 0 messages
it keeps in corpus.txt the smallest inputs of FOLDER, each of which has covered something new: KEPT bytes of them.
"""

from __future__ import annotations

import asyncio
import base64
import os
import sys
import time
from pathlib import Path
from tempfile import mkdtemp

import atheris  # type: ignore[import-not-found,unused-ignore]  # not a dependency: pip install atheris

with atheris.instrument_imports(include=["gmemd"]):
    from gmemd.schema.validate import Schema
    from tests.robustness.fuzz import CORPUS, LONGEST, Target, corpus, seeds

KEPT = 24 << 10
_A_LINE = 100_000  # messages


def main(most: int, folder: str) -> None:
    """Try inputs until that many messages were answered."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate([*seeds(Schema.load()), *corpus()]):
        (place / f"seed{number}").write_bytes(text[:LONGEST])
    loop, target, begun = asyncio.new_event_loop(), Target(), time.monotonic()
    asyncio.set_event_loop(loop)

    told = 0

    def one(data: bytes) -> None:
        nonlocal told
        loop.run_until_complete(target.once(data))
        if target.messages >= min(told + _A_LINE, most):
            told = target.messages
            print(f"{told:,} messages, {time.monotonic() - begun:.0f} s: nothing wrong", flush=True)
            if told >= most:
                os._exit(0)

    _fuzz(one, str(place), f"-artifact_prefix={place}/wrong-")


def keep(folder: str) -> None:
    """Make corpus.txt."""
    found = [path.read_bytes() for path in Path(folder).iterdir() if not path.name.startswith(("seed", "wrong"))]
    left, lines = KEPT, []
    for data in sorted(found, key=lambda data: (len(data), data)):
        left -= len(data)
        if left >= 0:
            lines.append(base64.b64encode(data) + b"\n")
    CORPUS.write_bytes(b"".join(lines))
    print(f"{len(corpus())} inputs, {CORPUS.stat().st_size} bytes")


def _fuzz(one: object, *options: str) -> None:
    atheris.Setup([sys.argv[0], f"-max_len={LONGEST}", "-timeout=60", "-rss_limit_mb=4096", "-reload=0",
                   "-print_final_stats=1", *options], one)
    atheris.Fuzz()


if __name__ == "__main__":
    where = sys.argv[2] if len(sys.argv) > 2 else mkdtemp()
    main(int(sys.argv[1]), where) if int(sys.argv[1]) else keep(where)
