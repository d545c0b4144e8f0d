"""A keeper whose daemons are forked with all modules loaded: a restart costs 40 ms and not 400.

Only the last step differs from `gmemd --keeper`: instead of exec(2) the child runs the same main. What exec would do
to the descriptors and the environment is done here. The ladder restarts the real thing.

    python -m tests.robustness.warm KEEPER-OPTION... --exec gmemd DAEMON-ARGUMENT...
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sqlite3
import sys
from typing import NoReturn

import gmemd.cli.gmemd
import gmemd.daemon
import gmemd.kernel.simulated
import gmemd.persist.custody
import gmemd.persist.registry
import gmemd.schema.help
import gmemd.schema.keyval
from gmemd.commands.dispatch import Dispatcher
from gmemd.keeper.keeper import run_keeper
from gmemd.schema.validate import Schema
from gmemd.server.ahead import HeldDirectories
from tests.robustness.world import HOLD, NEXT


def serve(_program: str, command: list[str], environ: dict[str, str]) -> NoReturn:
    """In the child, instead of exec: become the daemon."""
    status = 1
    try:
        os.environ.clear()
        os.environ.update(environ)
        os.closerange(3 + int(environ["LISTEN_FDS"]), os.sysconf("SC_OPEN_MAX"))
        if os.path.exists(environ.get(HOLD, "")):
            os.kill(os.getpid(), signal.SIGSTOP)
        if os.path.exists(environ.get(NEXT, "")):
            _become_next()
        status = gmemd.cli.gmemd.main(command[1:])
    except SystemExit as exc:
        status = int(exc.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(status)


def _become_next() -> None:
    """Know one more version of the registry, as the gmemd of tomorrow."""
    defaults = gmemd.persist.registry.Registry.__init__.__kwdefaults__ or {}
    defaults["migrations"] = (*defaults["migrations"], _add_column)


def _add_column(db: sqlite3.Connection) -> None:
    db.execute("ALTER TABLE objects ADD COLUMN tomorrow TEXT NOT NULL DEFAULT 'sunny'")


async def _loaded(self: gmemd.daemon.Daemon, dispatcher: Dispatcher, directories: HeldDirectories) -> None:
    """Everything is loaded already."""
    with directories:
        gc.enable()
    dispatcher.loader.loads_nothing = None


def main() -> int:
    """Load everything, then keep."""
    gmemd.cli.gmemd.make_parser()
    schema = Schema.load()
    schema.check_object({"qom-type": "memory-backend-memfd", "id": "warm", "size": 4096})
    schema.check_property("memory-backend-memfd", "merge", False)
    asyncio.run(asyncio.sleep(0))
    gmemd.daemon.Daemon._load_ahead = _loaded  # type: ignore[method-assign]  # a thread would be traced with the rest
    os.execvpe = serve  # type: ignore[assignment]  # of this program alone: the keeper's child ends by it
    gc.collect()
    gc.freeze()
    return run_keeper(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
