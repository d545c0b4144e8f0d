"""A running QEMU: its guest stopped, its device state saved and loaded, over its QMP socket.

Device state goes through a pipe that QEMU is given (`getfd`, `migrate fd:`): QEMU 7.2 and 11.1 both take that, while a
file is refused by one or the other. Saves have the capability x-ignore-shared, unless the RAM is wanted, too: without
it QEMU reads all of the RAM, and so fills every hole of it.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from gmemd.client.client import Client, ProtocolError
from gmemd.errors import QmpError
from gmemd.vmm.ending import VmmError, pidfd_of
from gmemd.vmm.state import copy_state, is_pipe, is_whole

_NAME = "gmemd-state"  # of the descriptor in QEMU
_PAUSES = (0.001, 0.05)  # seconds between two looks at a migration, at first and at most


class Backend(NamedTuple):
    """A memory backend of a VMM."""

    id: str
    qom_type: str
    size: int  # bytes
    share: bool
    path: str | None  # mem-path, as the VMM was given it


class Qemu:
    """A connection to a QEMU. It has one monitor at that socket: who comes later waits until we close.

    `timeout` (seconds) applies to connecting and to each command; `wait`: how long to try while it is starting;
    `address`: where it listens, if it is not found by `path`.
    VmmError from every method; a late answer leaves the connection usable.
    """

    def __init__(self, path: str, timeout: float = 10.0, *, wait: float = 0.0, address: str = "") -> None:
        self.path = path
        self.timeout = timeout
        with self._errors("does not answer as a QMP server"):
            self.client = Client(address or path, timeout=timeout, wait=wait)
        try:
            self.pid = self.client.peer_pid  # of the process that listens
            with self._errors("does not say its version"):
                self.version = _version(self.client.greeting)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Qemu:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.client.close()

    def ask(self, command: str, arguments: dict[str, Any] | None = None, *, fds: tuple[int, ...] = (),
            timeout: float | None = None) -> Any:
        """Run any command; its value as the VMM sent it."""
        with self._errors(f"does not answer '{command}'", refuses=f"refuses '{command}'"):
            return self.client.execute(command, arguments, fds=fds, timeout=timeout)

    def ask_list(self, command: str, arguments: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Run a command that returns a list of objects."""
        found = self.ask(command, arguments)
        if not (isinstance(found, list) and all(isinstance(entry, dict) for entry in found)):
            raise VmmError(f"the VMM at '{self.path}' answers '{command}' with something else than a list")
        return found

    def next_event(self, seconds: float) -> dict[str, Any] | None:
        """Take the next event; None: there is none in that time."""
        with self._errors("does not send events"):
            try:
                return self.client.wait_event(timeout=max(seconds, 0.0))
            except TimeoutError:
                return None

    # -- the guest

    def status(self) -> str:
        """The run state: running, paused, inmigrate, postmigrate, ..."""
        return str(_member(self.ask("query-status"), "status", str, self.path, "query-status"))

    def stop(self) -> None:
        """Stop the guest; returns when it is stopped and its disks are written."""
        self.ask("stop")
        if (status := self.status()) == "running":
            raise VmmError(f"the guest at '{self.path}' is {status} although it was stopped")

    def cont(self) -> None:
        """Let the guest run, and wait until it does."""
        self.ask("cont")
        self._wait_status(lambda status: status == "running", "the guest does not run")

    def quit(self) -> None:
        """End the VMM, and wait until its process has ended."""
        pidfd = pidfd_of(self.pid)
        try:
            with contextlib.suppress(ConnectionError):
                self._quit()
            if pidfd is not None and not select.select([pidfd], [], [], self.timeout)[0]:
                raise VmmError(f"the VMM at '{self.path}' (process {self.pid}) was told to quit and does not end")
        finally:
            if pidfd is not None:
                os.close(pidfd)
            self.close()

    def _quit(self) -> None:
        with self._errors("does not answer 'quit'", refuses="refuses 'quit'", gone=False):
            self.client.execute("quit")

    # -- its memory

    def backends(self) -> list[Backend]:
        """The memory backends."""
        found = []
        for entry in self.ask_list("query-memdev"):
            name = _member(entry, "id", str, self.path, "query-memdev")
            members = {one.get("name") for one in self.ask_list("qom-list", {"path": f"/objects/{name}"})}
            path = self.ask("qom-get", {"path": f"/objects/{name}", "property": "mem-path"}) \
                if "mem-path" in members else None
            kind = self.ask("qom-get", {"path": f"/objects/{name}", "property": "type"})
            found.append(Backend(name, str(kind), _member(entry, "size", int, self.path, "query-memdev"),
                                 _member(entry, "share", bool, self.path, "query-memdev"),
                                 None if path is None else str(path)))
        return found

    def only_shared(self) -> str:
        """The id of the one backend with share=on; VmmError: there are others, whose memory no device state holds."""
        found = [_member(entry, "id", str, self.path, "query-memdev")
                 for entry in self.ask_list("query-memdev") if entry.get("share")]
        if len(found) != 1:
            raise VmmError(f"the VMM at '{self.path}' has {len(found)} memory backends with share=on, "
                           "and a checkpoint is of one object")
        return str(found[0])

    # -- device state

    def capabilities(self, **wanted: bool) -> dict[str, bool]:
        """Set migration capabilities (underscores for hyphens); what they were, to be set again in the same way."""
        named = {name.replace("_", "-"): value for name, value in wanted.items()}
        there = {entry.get("capability"): entry.get("state") for entry in self.ask_list("query-migrate-capabilities")}
        for name in named:
            if name not in there:
                raise VmmError(f"the VMM at '{self.path}' has no migration capability '{name}'")
        self.ask("migrate-set-capabilities",
                 {"capabilities": [{"capability": name, "state": value} for name, value in named.items()]})
        return {name.replace("-", "_"): bool(there[name]) for name in named}

    def save_state(self, fd: int) -> int:
        """Write the device state of a stopped guest to a file or a pipe; its bytes (0: straight into a pipe).

        The guest stays stopped, and must be let go (`cont`) before it can be saved again.
        """
        if is_pipe(fd):
            self.begin_save(fd)
            self.wait_migration()
            return 0
        reader, writer = os.pipe()
        try:
            try:
                self.begin_save(writer)
            finally:
                os.close(writer)
            size = copy_state(reader, fd, self.timeout, self.path)
        finally:
            os.close(reader)
        self.wait_migration()
        return size

    def load_state(self, fd: int) -> None:
        """Load a device state into a VMM that was started with `-incoming defer`: a file, read from where it is, or a
        pipe. The guest is stopped afterwards.

        A VMM that cannot load it ends, and says why on its standard error.
        """
        if is_pipe(fd):
            self.begin_load(fd)
        else:
            reader, writer = os.pipe()
            try:
                try:
                    self.begin_load(reader, whole=is_whole(fd))
                finally:
                    os.close(reader)
                copy_state(fd, writer, self.timeout, self.path)
            finally:
                os.close(writer)
        self.wait_loaded()

    def prepare(self, pipe: int, *, whole: bool = False) -> None:
        """Give the VMM the pipe for its state, of which it has its own copy then; the guest may still run."""
        self.capabilities(x_ignore_shared=not whole)
        self.ask("getfd", {"fdname": _NAME}, fds=(pipe,))

    def begin_save(self, pipe: int | None = None, *, whole: bool = False) -> None:
        """Have the device state of a stopped guest written into a pipe; None: the one that was prepared.

        `whole`: with the shared RAM; the guest may run then, and is stopped at the end.
        """
        self._begin("migrate", pipe, whole)

    def begin_load(self, pipe: int, *, whole: bool = False) -> None:
        """Have a device state read from a pipe; `wait_loaded` then. `whole`: as it was saved."""
        self._begin("migrate-incoming", pipe, whole)

    def _begin(self, command: str, pipe: int | None, whole: bool) -> None:
        if pipe is not None:
            self.prepare(pipe, whole=whole)
        try:
            self.ask(command, {"uri": f"fd:{_NAME}"})
        except VmmError:
            self.close_pipe()
            raise

    def close_pipe(self) -> None:
        """Have a prepared pipe closed, if it was not used."""
        with contextlib.suppress(VmmError):
            self.ask("closefd", {"fdname": _NAME})

    def wait_migration(self) -> None:
        """Wait until a migration has completed; VmmError in QEMU's words if it failed."""
        deadline = time.monotonic() + self.timeout
        pause, longest = _PAUSES
        while True:
            found = self.ask("query-migrate")
            status = found.get("status") if isinstance(found, dict) else found
            if status == "completed":
                return
            if status in ("failed", "cancelled"):
                raise VmmError(f"the VMM at '{self.path}' cannot transfer its state: "
                               f"{found.get('error-desc', status)}")
            if time.monotonic() > deadline:
                raise VmmError(f"the VMM at '{self.path}' has not transferred its state after {self.timeout:g} s "
                               f"(status: {status})")
            time.sleep(pause)
            pause = min(pause * 2, longest)

    def wait_loaded(self) -> None:
        """Wait until a state is loaded and the guest could run."""
        self.wait_migration()
        self._wait_status(lambda status: status != "inmigrate", "the state is not loaded")

    def cancel(self) -> None:
        """Cancel a migration, if there is one."""
        self.ask("migrate_cancel")

    # -- small parts

    def _wait_status(self, good: Any, complaint: str) -> None:
        deadline = time.monotonic() + self.timeout
        pause, longest = _PAUSES
        while not good(status := self.status()):
            if status in ("guest-panicked", "internal-error", "io-error", "shutdown") or time.monotonic() > deadline:
                raise VmmError(f"{complaint} in the VMM at '{self.path}' (status: {status})")
            time.sleep(pause)
            pause = min(pause * 2, longest)

    @contextlib.contextmanager
    def _errors(self, silent: str, *, refuses: str = "", gone: bool = True) -> Iterator[None]:
        """What can go wrong with one question, as one sentence."""
        who = f"the VMM at '{self.path}'"
        try:
            yield
        except QmpError as exc:
            raise VmmError(f"{who} {refuses or silent}: {exc.desc}") from exc
        except TimeoutError as exc:
            raise VmmError(f"{who} {silent} within {self.timeout:g} s") from exc
        except ProtocolError as exc:
            raise VmmError(f"{who} does not speak QMP: {exc}") from exc
        except (ConnectionResetError, BrokenPipeError) as exc:
            if not gone:
                raise
            raise VmmError(f"{who} has ended or closed the connection") from exc
        except (OSError, ValueError) as exc:
            raise VmmError(f"cannot use '{self.path}': {getattr(exc, 'strerror', None) or exc}") from exc


def _version(greeting: dict[str, Any]) -> tuple[int, int, int]:
    """QEMU's version by its greeting's "QMP" member; ProtocolError if it has none."""
    try:
        found = greeting["version"]["qemu"]
        return int(found["major"]), int(found["minor"]), int(found["micro"])
    except (KeyError, TypeError, ValueError):
        raise ProtocolError("the server's greeting has no version of QEMU") from None


def _member(value: Any, name: str, kind: type, path: str, command: str) -> Any:
    found = value.get(name) if isinstance(value, dict) else None
    if not isinstance(found, kind):
        raise VmmError(f"the VMM at '{path}' answers '{command}' without '{name}'")
    return found
