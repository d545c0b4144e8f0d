"""gmemctl, and a kill at a certain message that it sends: python -m tests.e2e.killing WHOM AT ARGUMENTS...

WHOM: self, new (the VMM that it has started) or a process id. AT: -COMMAND before the first message with that command,
to whomever it is, +COMMAND after it; 2n-1 before the nth message, 2n after it; 0: never. At the end it says on standard
error how many messages it has sent.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence

from gmemd.cli.gmemctl import main
from gmemd.client.client import Client
from gmemd.vmm.start import Started

whom, at = sys.argv[1:3]
points = 0
new = 0
send, start = Client._send, Started.__init__


def pass_by(name: str) -> None:
    global points, at
    points += 1
    if at in (str(points), name):
        at = ""
        os.kill(os.getpid() if whom == "self" else new if whom == "new" else int(whom), signal.SIGKILL)


def counted(self: Client, data: bytes, fds: Sequence[int], deadline: float | None) -> None:
    command = json.loads(data)["execute"]
    pass_by(f"-{command}")
    send(self, data, fds, deadline)
    pass_by(f"+{command}")


def started(self: Started, *arguments: object, **options: object) -> None:
    global new
    start(self, *arguments, **options)  # type: ignore[arg-type]
    new = self.pid


Client._send, Started.__init__ = counted, started  # type: ignore[method-assign]
status = main(sys.argv[3:])
print(f"{points // 2} messages", file=sys.stderr)
sys.exit(status)
