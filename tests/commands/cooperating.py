"""A process that maps an object, hands its userfaultfd over, and touches pages when it is told to.

`python -m tests.commands.cooperating OBJECT_FD SIZE SOCKET_FD`: sends the address with its userfaultfd over the
socket, then obeys lines: "call N" has write(2) read the byte at N, "touch N" reads it itself, "put N" writes one,
"drop N" unmaps the page at N by madvise(2). "run 0" writes 1, 2, 3, ... to the pages in turn from then on.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import mmap
import os
import platform
import socket
import struct
import sys
import threading

_SYSCALL = {"x86_64": 323, "aarch64": 282}[platform.machine()]
_USER_MODE_ONLY = 1
_API = 0xC018AA3F
_SIGBUS = 1 << 7


def userfaultfd(features: int = _SIGBUS) -> int:
    """A userfaultfd of this process."""
    uffd: int = ctypes.CDLL(None, use_errno=True).syscall(_SYSCALL, _USER_MODE_ONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if uffd < 0:
        raise OSError(ctypes.get_errno(), "userfaultfd")
    fcntl.ioctl(uffd, _API, bytearray(struct.pack("<QQQ", 0xAA, features, 0)), True)
    return uffd


def _run(memory: mmap.mmap) -> None:
    pages, number = len(memory) // mmap.PAGESIZE, 0
    while True:
        number += 1
        struct.pack_into("<Q", memory, number % pages * mmap.PAGESIZE, number)


def main() -> None:
    object_fd, size, socket_fd, features = map(int, sys.argv[1:])
    memory = mmap.mmap(object_fd, size)
    uffd = userfaultfd(features)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    channel = socket.socket(fileno=socket_fd)
    channel.sendmsg([b"%d\n" % address], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [uffd]))])
    os.close(uffd)
    reader, writer = os.pipe()
    for line in channel.makefile():
        verb, number = line.split()
        at = int(number)
        if verb == "call":
            try:
                os.write(writer, memoryview(memory)[at:at + 1])
                answer = str(os.read(reader, 1)[0])
            except OSError as exc:
                answer = errno.errorcode[exc.errno or 0]
        elif verb == "put":
            memory[at] = 77
            answer = "ok"
        elif verb == "drop":
            memory.madvise(mmap.MADV_DONTNEED, at, mmap.PAGESIZE)
            answer = "ok"
        elif verb == "run":
            threading.Thread(target=_run, args=(memory,), daemon=True).start()
            answer = "ok"
        else:
            answer = str(memory[at])
        channel.sendall(answer.encode() + b"\n")


if __name__ == "__main__":
    main()
