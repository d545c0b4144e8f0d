"""Bad input costs nothing: QEMU's error, the next command works, no descriptor and no memory stays behind."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

import pytest

from tests.daemon import Daemon

MIB = 1 << 20
ANSWERED = [  # each is refused with at least one error
    b"\x1b",
    b"\xff\xfe{]",
    b'{"execute": "query-name", "id": 01}\n',
    b"[" * 5000 + b"\x1b",
    b'{"execute": "object-add", "arguments": {"qom-type": "memory-backend-ram", "id": "x", "size": "1M"}}',
    b'{"execute": "object-add", "arguments": {"qom-type": "memory-backend-nvram", "id": "x"}}',
    b'{"execute": "object-add", "arguments": {"qom-type": "memory-backend-memfd", "id": "x", "size": -1}}',
    b'{"execute": "' + b"x" * MIB + b'"}',
    b'{"execute": "query-name", "arguments": {"' + b"y" * MIB + b'": [[]]}}',
    b'{"execute": "closefd", "arguments": {"fdname": "nobody"}}',
]
NEXT = b'\x1b{"execute": "query-name", "id": "next"}'  # ESC gives up what is half sent
VANISHING = [  # sent by a client that goes away without reading
    b"",
    b'{"execute": "qmp_capab',
    b'{"execute": "qmp_capabilities"}' + b'{"execute": "query-qmp-schema"}' * 50,
    b'{"execute": "qmp_capabilities"}{"execute": "query-name", "id": "' + b"z" * MIB,
    b'{"execute": "qmp_capabilities"}' + b"[" * (MIB >> 4),
]


def one_round(daemon: Daemon) -> None:
    """All bad input once, a descriptor along with each; after each the next command works."""
    with daemon.connect() as sock, sock.makefile("rb") as answers, open(os.devnull, "rb") as null:
        answers.readline()
        sock.sendall(b'{"execute": "qmp_capabilities"}')
        answers.readline()
        for text in ANSWERED:
            socket.send_fds(sock, [text[:1]], [null.fileno()])
            sock.sendall(text[1:] + NEXT)
            assert b'"error"' in answers.readline(), text[:80]
            while (answer := answers.readline()) != b'{"return": {}, "id": "next"}\r\n':
                assert b'"error"' in answer, text[:80]
    for text in VANISHING:
        with daemon.connect() as sock:
            send_and_forget(sock, text)


def send_and_forget(sock: socket.socket, text: bytes) -> None:
    """Send what the daemon takes at once."""
    sock.setblocking(False)
    with suppress(BlockingIOError):
        sock.send(text)


def resident(daemon: Daemon) -> int:
    """Bytes of the daemon's resident memory."""
    [line] = [line for line in Path(f"/proc/{daemon.pid}/status").read_text().splitlines()
              if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024


@pytest.mark.e2e
def test_bad_input_leaves_nothing(daemon: Daemon) -> None:
    """After many rounds of bad input the daemon holds the descriptors and the memory that it held before."""
    for _ in range(5):  # allocators and caches fill up
        one_round(daemon)
    with daemon.client():
        fds, memory = daemon.open_fds(), resident(daemon)
    for _ in range(10):
        one_round(daemon)
    with daemon.client() as client:
        assert client.execute("query-memdev") == []
        assert daemon.settled_fds(fds) <= fds
        assert resident(daemon) < memory + 8 * MIB
