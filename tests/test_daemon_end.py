"""The end of a daemon that has just begun."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from gmemd.daemon import Daemon, Options, Plain, QmpSocket
from gmemd.persist.manager import Manager
from gmemd.schema.validate import Schema
from tests.patience import PATIENCE


class Loading(Schema):
    """A schema that is being loaded until that is not wanted any more."""

    def prepare(self, unwanted: Callable[[], bool] = lambda: False) -> None:
        self.began.set()
        end = time.monotonic() + PATIENCE
        while not unwanted() and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(0.05)  # what cannot be interrupted
        self.ended = True

    began: threading.Event
    ended = False


async def test_end_waits_for_what_is_loaded(tmp_path: Path) -> None:
    """A thread that loads ahead has ended when the daemon has: inside a library it would abort the process."""
    schema = Loading.load()
    assert isinstance(schema, Loading)
    schema.began = threading.Event()

    options = Options(qmp=(QmpSocket(str(tmp_path / "q")),), kernel="simulated", persist="off")
    program = Plain(options)
    program.schema = schema
    daemon = Daemon(options, Manager({}), program)
    running = asyncio.create_task(daemon.run())
    async with asyncio.timeout(PATIENCE):
        while not schema.began.is_set():
            await asyncio.sleep(0.001)
        signal.raise_signal(signal.SIGTERM)
        await running
    assert schema.ended
