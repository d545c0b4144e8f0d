"""A server on a bare asyncio loop: it greets, then answers whatever it reads with the same bytes, unread.

usage: bare.py SOCKET

What the event loop, its system calls and Python itself cost before anything is understood or done.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys

VERSION = b'{"qemu": {"micro": 0, "minor": 1, "major": 11}, "package": "bare"}'
GREETING = b'{"QMP": {"version": ' + VERSION + b', "capabilities": []}}\r\n'
REPLY = b'{"return": ' + VERSION + b"}\r\n"
ANCILLARY = socket.CMSG_SPACE(4 * 253)  # room for descriptors, which a QMP server must take


async def main(path: str) -> None:
    loop = asyncio.get_running_loop()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    listener.setblocking(False)

    def accept() -> None:
        client, _ = listener.accept()
        client.setblocking(False)
        client.send(GREETING)

        def readable() -> None:
            data, *_ = client.recvmsg(1 << 14, ANCILLARY)
            if data:
                client.send(REPLY)
            else:
                loop.remove_reader(client.fileno())
                client.close()

        loop.add_reader(client.fileno(), readable)

    loop.add_reader(listener.fileno(), accept)
    end = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, end.set)
    await end.wait()
    os.unlink(path)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
