"""A file system in user space with one file, whose server stops answering when it is told to.

Speaks just enough of the FUSE protocol (include/uapi/linux/fuse.h) for a file that is opened, asked and mapped.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

_LOOKUP, _FORGET, _GETATTR, _OPEN, _STATFS, _FLUSH, _INIT, _BATCH_FORGET, _FALLOCATE = 1, 2, 3, 14, 17, 25, 26, 42, 43
_HEADER = struct.Struct("<IIQQIIIHH")  # len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding
_ANSWER = struct.Struct("<IiQ")  # len, error, unique
_ATTR = struct.Struct("<6Q10I")  # ino, size, blocks, three times, three nanoseconds, mode, nlink, uid, gid, ...
_MNT_FORCE, _MNT_DETACH = 1, 2
_ROOT, _FILE = 1, 2


class FrozenFiles:
    """A mounted directory with a file `memory` of `size` bytes. OSError where mounting is not allowed."""

    def __init__(self, directory: Path, size: int) -> None:
        self.directory = directory
        self.path = directory / "memory"
        self._size = size
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},allow_other"
        if self._libc.mount(b"fuse", bytes(directory), b"fuse", 6, options.encode()):
            code = ctypes.get_errno()
            os.close(self._fd)
            raise OSError(code, os.strerror(code))
        self._lock = threading.Lock()
        self._left = -1  # requests that are answered before the rest is held; -1: all are
        self._held: list[bytes] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def hang(self, after: int) -> None:
        """Answer so many requests more, and then none until `thaw`."""
        with self._lock:
            self._left = after

    def thaw(self) -> bool:
        """Answer what has come, and go on; whether anything had to wait."""
        with self._lock:
            held, self._held, self._left = self._held, [], -1
        for request in held:
            self._answer(request)
        return bool(held)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.thaw()
        self._libc.umount2(bytes(self.directory), _MNT_FORCE | _MNT_DETACH)
        self._thread.join()
        os.close(self._fd)

    def _serve(self) -> None:
        while True:
            try:
                request = os.read(self._fd, 1 << 20)
            except OSError as exc:
                if exc.errno in (errno.EINTR, errno.ENOENT):  # the latter: it was interrupted
                    continue
                return  # unmounted
            with self._lock:
                hold = self._left == 0
                if hold:
                    self._held.append(request)
                elif self._left > 0:
                    self._left -= 1
            if not hold:
                self._answer(request)

    def _answer(self, request: bytes) -> None:
        _, opcode, unique, node, *_ = _HEADER.unpack_from(request)
        if opcode in (_FORGET, _BATCH_FORGET):
            return
        body = self._body(opcode, node)
        error = 0 if body is not None else -errno.ENOSYS
        body = body or b""
        with suppress(OSError):  # nobody waits for it any more
            os.write(self._fd, _ANSWER.pack(_ANSWER.size + len(body), error, unique) + body)

    def _body(self, opcode: int, node: int) -> bytes | None:
        if opcode == _INIT:
            return struct.pack("<4I2H2I2H8I", 7, 31, 0, 0, 0, 0, 1 << 16, 1, 0, 0, *[0] * 8)
        if opcode == _LOOKUP:
            return struct.pack("<4Q2I", _FILE, 0, 0, 0, 0, 0) + self._attributes(_FILE)
        if opcode == _GETATTR:
            return struct.pack("<Q2I", 0, 0, 0) + self._attributes(node)
        if opcode == _OPEN:
            return struct.pack("<Q2I", 0, 0, 0)
        if opcode == _STATFS:
            return struct.pack("<5Q4I24x", 0, 0, 0, 0, 0, 4096, 255, 4096, 0)
        if opcode in (_FLUSH, _FALLOCATE):  # the former at each close(2)
            return b""
        return None

    def _attributes(self, node: int) -> bytes:
        mode = stat.S_IFDIR | 0o755 if node == _ROOT else stat.S_IFREG | 0o644
        size = 0 if node == _ROOT else self._size
        return _ATTR.pack(node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, os.getuid(), os.getgid(), 0, 4096, 0)
