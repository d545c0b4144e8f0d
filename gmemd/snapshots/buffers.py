"""What one thread reads into: page-aligned memory, as direct I/O needs it."""

from __future__ import annotations

import contextlib
import mmap

from gmemd.snapshots.pages import CHUNK


class Buffers:
    """`data` for what is read, `base` for what it is compared with; each holds a chunk."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 2 * CHUNK)
        view = memoryview(self._memory)
        self.data, self.base = view[:CHUNK], view[CHUNK:]
        view.release()

    def __enter__(self) -> Buffers:
        return self

    def __exit__(self, *_: object) -> None:
        self.data.release()
        self.base.release()
        with contextlib.suppress(BufferError):  # a part of it is still in a traceback, and goes with that
            self._memory.close()
