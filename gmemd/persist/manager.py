"""The service manager as the daemon sees it: systemd, the keeper, or nobody.

Everything it says comes by the environment and is taken from there once, so that no child inherits the
claim.
"""

from __future__ import annotations

import os
from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from gmemd.errors import QmpError
from gmemd.persist.fdstore import FdStore, Notifier, listen_fds, store_limit, watchdog_seconds
from gmemd.persist.private import exposed
from gmemd.persist.record import State
from gmemd.persist.restore import Identify, Restored, sort_out
from gmemd.survival import Keeping

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from gmemd.commands.context import Gmemd
    from gmemd.persist.custody import Custody

REGISTRY = "registry.sqlite"
NO_STATE = State(0, "", 0, 0, 0, ())  # of a registry that is not there
_STATUS_DELAY = 1.0  # seconds between two STATUS= lines at least


class Manager:
    """What was passed on at start, and the notifications that go the other way."""

    def __init__(
        self,
        notifier: Notifier | None,
        fds: list[tuple[str, int]],
        limit: int,
        watchdog: float | None,
        keeping: Keeping,
    ) -> None:
        self.keeping = keeping
        self._notifier = notifier
        self._fds = fds
        self._limit = limit  # entries of the fd store
        self._watchdog = watchdog  # seconds
        self._loop: AbstractEventLoop | None = None
        self._status_due = False

    @classmethod
    def from_environ(cls, environ: MutableMapping[str, str]) -> Manager:
        """Take what the environment says."""
        keeping = _keeping(environ)
        watchdog, fds = watchdog_seconds(environ), listen_fds(environ)
        limit, notifier = store_limit(environ), Notifier.from_environ(environ)
        return cls(notifier, fds, limit, watchdog, keeping)

    def disturb(self, wrap: Callable[[Notifier], Notifier]) -> None:
        """Put something between the daemon and the service manager; before `custody`."""
        if self._notifier is not None:
            self._notifier = wrap(self._notifier)

    def custody(self, persist: str, directory: str) -> Custody | None:
        """Open the registry in `directory`; None when objects are not to be kept, or (auto) nobody could keep them."""
        if persist == "off" or (persist == "auto" and (self._notifier is None or self._limit == 0)):
            return None
        if self._notifier is None:
            raise QmpError(
                "nobody keeps file descriptors here: start gmemd by systemd or with --keeper, or use --persist off"
            )
        from gmemd.persist.custody import Custody  # only here, for SQLite takes its time
        from gmemd.persist.registry import Registry

        _make_directory(directory)
        return Custody(Registry(os.path.join(directory, REGISTRY)), self._notifier, FdStore(self._limit))

    def restore(self, custody: Custody | None, identify: Identify) -> Restored:
        """What a predecessor left, sockets among it."""
        if custody is not None:
            return custody.restore(self._fds, identify)
        return sort_out(self._fds, [], NO_STATE, trusted=False)

    def serve(self, loop: AbstractEventLoop, gmemd: Gmemd) -> None:
        """Say that the daemon serves, feed the watchdog from the loop, and show what is held."""
        self._loop, self._gmemd = loop, gmemd
        if self._notifier is not None:
            self._say(self._notifier.ready, self._status())
            self._feed()

    def status_changed(self) -> None:
        """Show soon what is held now."""
        if self._notifier is not None and self._loop is not None and not self._status_due:
            self._status_due = True
            self._loop.call_later(_STATUS_DELAY, self._show)

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

    def _status(self) -> str:
        objects = list(self._gmemd.objects)
        size = sum(backend.memory_size for backend in objects) >> 20
        lost = f", {len(self._gmemd.lost)} lost" if self._gmemd.lost else ""
        return f"{len(objects)} objects of {size} MiB in all, kernel {self._gmemd.kernel.name}{lost}"

    @staticmethod
    def _say(message: Any, *arguments: Any) -> None:
        """Send a notification that may be missed."""
        try:
            message(*arguments)
        except OSError:
            return


def _make_directory(directory: str) -> None:
    """Make the registry's directory, or see that the one that is there is safe."""
    umask = os.umask(0o077)
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
    finally:
        os.umask(umask)
    place = exposed(directory)
    if place:
        raise QmpError(f"'{place}' can be written by others, who could replace the registry in '{directory}': "
                       f"take the right away from them (chmod go-w), or name another --state-dir")


def _keeping(environ: MutableMapping[str, str]) -> Keeping:
    """Who keeps descriptors, by the environment that the manager has set."""
    notify = environ.get("NOTIFY_SOCKET", "")
    if not notify:
        return Keeping()
    if not notify.endswith("/systemd/notify"):
        return Keeping("keeper", pid=os.getppid())
    # The unit says so itself, beside FileDescriptorStorePreserve=, which nothing else tells the service;
    # $FDSTORE comes from systemd 254 on, which is the first to know that setting.
    preserve = "FDSTORE" in environ and environ.get("GMEMD_FDSTORE_PRESERVE") == "yes"
    return Keeping("systemd", preserve, os.path.exists("/dev/liveupdate"))
