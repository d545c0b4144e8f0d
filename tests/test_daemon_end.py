"""The end of a daemon that has just begun, or has more to do."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from pathlib import Path

import pytest

from gmemd.daemon import Daemon, Options, QmpSocket
from gmemd.errors import QmpError
from gmemd.observe.log import log
from gmemd.persist.manager import Manager
from tests.daemon import Daemon as Process
from tests.patience import PATIENCE, wait_for
from tests.persist.manager import StandIn


async def test_end_waits_for_what_is_loaded(tmp_path: Path) -> None:
    """A thread that loads ahead has ended when the daemon has: inside a library it would abort the process."""
    began, ending, ended = threading.Event(), threading.Event(), []

    def load() -> None:
        began.set()
        ending.wait(PATIENCE)
        time.sleep(0.05)  # what cannot be interrupted
        ended.append(True)

    path = tmp_path / "q"
    daemon = Daemon(Options(qmp=(QmpSocket(str(path)),), kernel="simulated", persist="off"), Manager({}))
    running = asyncio.create_task(daemon.run())
    async with asyncio.timeout(PATIENCE):
        while not path.exists():
            await asyncio.sleep(0.001)
        assert daemon._dispatcher is not None
        loading = asyncio.create_task(daemon._dispatcher.loader.once("more", load))
        while not began.is_set():
            await asyncio.sleep(0.001)
        signal.raise_signal(signal.SIGTERM)
        ending.set()
        await running
        await loading
    assert ended


def test_work_that_never_begins_says_nothing(tmp_path: Path) -> None:
    """What waits for a change that is not durable yet is left undone at the end, without a word on standard error."""
    manager, memory = StandIn(tmp_path), {"id": "m", "size": 16 << 20}
    adding = {"execute": "object-add", "arguments": {"qom-type": "memory-backend-memfd", **memory}}
    discarding = {"execute": "memdev-discard", "arguments": {"offset": 0, **memory}}
    with Process(kernel="simulated", persist="on", env={"NOTIFY_SOCKET": manager.address, "FDSTORE": "9"}) as daemon:
        with daemon.client() as client, daemon.client() as other:
            client.send_text(b"".join(json.dumps(request).encode() for request in (adding, discarding)), 0)
            wait_for(lambda: other.execute("query-memdev"))
            daemon.process.send_signal(signal.SIGTERM)
            wait_for(lambda: not daemon.sock.exists())
            wait_for(lambda: manager.receive() or daemon.process.poll() is not None)
        assert "never awaited" not in daemon.log(), daemon.log()
    manager.close()


async def test_a_start_that_is_refused_leaves_the_log_without_a_loop() -> None:
    """A line that is logged after it is written at once."""
    with pytest.raises(QmpError, match="keeps file descriptors"):
        await Daemon(Options(qmp=(), persist="on"), Manager({})).run()
    assert log.call_later is None
