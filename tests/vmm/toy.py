"""A toy VMM: makes memfds as VMMs do, says on lines what came of them, and waits for the end of its standard input.

    python toy.py NAME:SIZE[:OPTION]... -- ...
OPTION: noseal (it forbids seals), nocloexec, nosize (it gives it no size), late (the rest only after a line of input),
file (an ordinary file instead); what follows "--" it leaves to a child, which outlives it.
"""

from __future__ import annotations

import fcntl
import os
import sys
import tempfile

F_ADD_SEALS, SEALS = 1033, 0x7


def make(spec: str) -> None:
    name, size, *options = spec.split(":")
    if "late" in options:
        sys.stdin.readline()
    flags = (0 if "noseal" in options else os.MFD_ALLOW_SEALING) | (0 if "nocloexec" in options else os.MFD_CLOEXEC)
    try:
        if "file" in options:
            fd = os.open(tempfile.gettempdir(), os.O_TMPFILE | os.O_RDWR)
        else:
            fd = os.memfd_create(name, flags)
        if "nosize" not in options:
            os.ftruncate(fd, int(size))
        if not {"noseal", "file"} & {*options}:
            fcntl.fcntl(fd, F_ADD_SEALS, SEALS)
        if "nosize" not in options:
            os.pwrite(fd, spec.encode(), 0)
    except OSError as exc:
        print(spec, exc.strerror, flush=True)
    else:
        status = os.fstat(fd)
        print(spec, status.st_ino, status.st_size, os.get_inheritable(fd), flush=True)


words, _, rest = " ".join(sys.argv[1:]).partition(" -- ")
for word in words.split():
    make(word)
if rest and os.fork() == 0:
    os.dup2(os.open(os.devnull, os.O_RDWR), 2)  # as one that goes into the background does
    make(rest)
    sys.stdin.readline()
    os._exit(0)
if not rest:
    sys.stdin.readline()
