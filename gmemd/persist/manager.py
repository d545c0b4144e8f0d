"""The service manager as the daemon sees it: systemd, the keeper, or nobody.

Everything it says comes in the environment and is removed from there, so that no child inherits it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from gmemd.errors import QmpError, close_fd
from gmemd.persist.keeping import Keeping, Unit
from gmemd.persist.liveupdate import is_on
from gmemd.persist.nobody import AnyCustody, Nobody
from gmemd.persist.notify import (
    DEFAULT_LIMIT,
    Notifier,
    listen_fds,
    raised_limit,
    runner_limit,
    store_limit,
    watchdog_seconds,
)
from gmemd.persist.unit import ask, own_unit
from gmemd.posix.boottime import boot_id
from gmemd.posix.private import exposed

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from gmemd.persist.carried import Copy
    from gmemd.persist.restore import Identify, Restored


REGISTRY = "registry.sqlite"
SYSTEMD = "/run/systemd/notify"  # the notify socket of the system's systemd, not of a user's
_STATUS_DELAY = 1.0  # seconds between two STATUS= lines, at least


class Manager:
    """What was passed at start, and the notifications in the other direction."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        """Take everything from the environment."""
        keeping = _keeping(environ)
        if keeping.old and "GMEMD_FDSTORE" not in environ:
            keeping = keeping._replace(unit=ask(keeping.name, user=keeping.user))
        self.keeping = keeping
        self._watchdog = watchdog_seconds(environ)
        self._fds = listen_fds(environ)
        self._limit = store_limit(environ, DEFAULT_LIMIT if keeping.unit is None else keeping.unit.limit)  # entries
        self._given = raised_limit()  # descriptors that this start could be given
        self._runner = runner_limit(environ)  # descriptors that the container runtime can pass on
        self._notifier = Notifier.from_environ(environ)
        self._disk = environ.get("STATE_DIRECTORY", "").partition(":")[0]
        self._loop: AbstractEventLoop | None = None
        self._copy: Copy | None = None  # of the registry, as it came from the store
        self._put_back = ""  # what was done with it
        self._status: Callable[[], str]
        self._status_due = False

    def ask(self) -> Unit | None:
        """What systemd reports for this service now; None where it does not answer. Blocks."""
        unit = ask(self.keeping.name, user=self.keeping.user)
        return None if unit is None else unit._replace(nofile=min(unit.nofile, self._runner))

    def disturb(self, wrap: Callable[[Notifier], Notifier]) -> None:
        """Put something between the daemon and the service manager; before `custody`."""
        if self._notifier is not None:
            self._notifier = wrap(self._notifier)

    def custody(self, persist: str, directory: str, close: Callable[[int], None] = close_fd) -> AnyCustody:
        """Open the registry in `directory`; Nobody when objects are not to be kept, or (auto) there is no manager to
        keep them.

        `close`: as for Custody.
        """
        if persist == "off" or (persist == "auto" and (self._notifier is None or self._limit == 0)):
            return Nobody()
        if self._notifier is None:
            raise QmpError("no service manager keeps file descriptors here: "
                           "start gmemd under systemd or --keeper, or use --persist off")
        from gmemd.persist.carried import newest, put_back  # imported only here because SQLite takes long
        from gmemd.persist.custody import Custody
        from gmemd.persist.fdstore import FdStore
        from gmemd.persist.note import take
        from gmemd.persist.registry import Registry

        _make_directory(directory)
        path = os.path.join(directory, REGISTRY)
        boot = boot_id()
        left = take(self._disk, boot) if self._disk else None
        copy = self._copy = newest(self._fds) or left
        self._put_back = put_back(copy, path)
        registry = Registry(path, spare=list if copy is None else copy.records)
        return Custody(registry, self._notifier, FdStore(self._limit, min(self._given, self._runner)), close=close,
                       carries=self.keeping.live_update, boot=boot)

    def restore(self, custody: AnyCustody, identify: Identify) -> Restored | None:
        """What a predecessor left, sockets among it; None: nothing."""
        if custody.keeps:
            restored = custody.restore(self._fds, identify, self._copy)
            restored.words[:0] = [self._put_back] if self._put_back else []
            return restored
        if not self._fds:
            return None
        from gmemd.persist.record import State
        from gmemd.persist.restore import Match, sort_out

        return sort_out(self._fds, [], State(0, "", 0, 0, 0, ()), Match(trusted=False))  # no registry exists

    def serve(self, loop: AbstractEventLoop, status: Callable[[], str]) -> None:
        """Say that the daemon serves, feed the watchdog from the loop, and show what is held, as `status` says it."""
        self._loop, self._status = loop, status
        if self._notifier is not None:
            self._say(self._notifier.ready, self._status())
            self._feed()

    def status_changed(self) -> None:
        """Update the status soon."""
        if self._notifier is not None and self._loop is not None and not self._status_due:
            self._status_due = True
            self._loop.call_later(_STATUS_DELAY, self._show)

    def leave(self, custody: AnyCustody) -> str:
        """At the end, note on the disk what is kept, if a kexec may come; why that failed, "" if it did not."""
        if not self._disk or not custody.keeps:
            return ""
        from gmemd.persist.note import leave

        return leave(custody, self._disk)

    def stopping(self) -> None:
        """Say that the daemon is about to end."""
        if self._notifier is not None:
            self._say(self._notifier.stopping)

    def _feed(self) -> None:
        if self._watchdog is not None and self._notifier is not None and self._loop is not None:
            self._say(self._notifier.watchdog)
            self._loop.call_later(self._watchdog / 3, self._feed)

    def _show(self) -> None:
        self._status_due = False
        if self._notifier is not None:
            self._say(self._notifier.status, self._status())

    @staticmethod
    def _say(message: Any, *arguments: Any) -> None:
        """Send a notification that may be missed."""
        try:
            message(*arguments)
        except OSError:
            return


def _make_directory(directory: str) -> None:
    """Create the registry's directory, or make sure that the existing one is safe."""
    umask = os.umask(0o077)
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
    finally:
        os.umask(umask)
    place = exposed(directory)
    if place:
        raise QmpError(f"'{place}' can be written by others, who could replace the registry in '{directory}': "
                       f"remove that permission (chmod go-w), or choose another --state-dir")


def _keeping(environ: MutableMapping[str, str]) -> Keeping:
    """Which manager keeps descriptors, by the environment that it has set."""
    notify = environ.get("NOTIFY_SOCKET", "")
    if not notify:
        return Keeping()
    if not notify.endswith("/systemd/notify"):
        return Keeping("keeper", pid=os.getppid())
    return Keeping("systemd", name=own_unit() or Keeping().name, old="FDSTORE" not in environ,
                   user=notify != SYSTEMD, live_update=is_on())
