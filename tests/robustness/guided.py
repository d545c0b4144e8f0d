"""Fuzzing guided by coverage: atheris finds the inputs that fuzz.py tries.

    python -m tests.robustness.guided MESSAGES [FOLDER]

It ends when that many messages were answered, or where something is wrong; FOLDER then has the input. With 0 messages
it keeps in corpus.txt what FOLDER has found: the smallest inputs for all the coverage of inputs up to KEPT bytes.
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

KEPT = 512  # bytes
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
    merged, loop, target = Path(mkdtemp()), asyncio.new_event_loop(), Target()
    asyncio.set_event_loop(loop)
    if os.fork() == 0:
        _fuzz(lambda data: loop.run_until_complete(target.once(data)), "-merge=1", str(merged), folder,
              f"-max_len={KEPT}")
        os._exit(0)
    os.wait()
    CORPUS.write_bytes(b"".join([base64.b64encode(path.read_bytes()) + b"\n" for path in sorted(
        merged.iterdir(), key=lambda path: (path.stat().st_size, path.name))]))
    print(f"{len(corpus())} inputs, {CORPUS.stat().st_size} bytes")


def _fuzz(one: object, *options: str) -> None:
    atheris.Setup([sys.argv[0], f"-max_len={LONGEST}", "-timeout=60", "-rss_limit_mb=4096", "-reload=0",
                   "-print_final_stats=1", *options], one)
    atheris.Fuzz()


if __name__ == "__main__":
    where = sys.argv[2] if len(sys.argv) > 2 else mkdtemp()
    main(int(sys.argv[1]), where) if int(sys.argv[1]) else keep(where)
