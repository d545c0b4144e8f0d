"""The servers that cases run on: gmemd, or a real QEMU, set up as the case says."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

from tests.conformance.replay import Case
from tests.daemon import Daemon, Server

NAMED = ("-name", "vmname", "-uuid", "11111111-2222-3333-4444-555555555555")
QEMU = "qemu-system-x86_64"
QEMU_SETUPS = {
    "plain": ("-qmp", "{address},server=on,wait=off"),
    "name": (*NAMED, "-qmp", "{address},server=on,wait=off"),
    "pretty": ("-chardev", "socket,id=c0,path={socket},server=on,wait=off",
               "-mon", "chardev=c0,mode=control,pretty=on"),
}


GMEMD_SETUPS = {
    "plain": (),
    "kvm": (),
    "nokvm": (),  # there is no accelerator but KVM or the simulation of it
    "name": ("--name", NAMED[1], "--uuid", NAMED[3]),
    "unstable-reject": ("--compat", "unstable-input=reject"),
    "pretty": (),
}


def start_gmemd(setup: str, kernel: str, *, measured: bool = True) -> Server:
    """Start a gmemd of this tree."""
    return Daemon(*GMEMD_SETUPS[setup], kernel=kernel, monitor=",pretty=on" if setup == "pretty" else "",
                  measured=measured)


def start_qemu(setup: str, _kernel: str) -> Server:
    """Start the QEMU of this host without any machine."""
    return Server([QEMU, "-machine", "none", "-nodefaults", "-display", "none", "-S", *QEMU_SETUPS[setup]])


class Servers:
    """Running servers: one for all the cases that may share one, a new one for each that may not.

    While one case runs, a plain server for the next is already starting.
    """

    def __init__(self, start: Callable[[str, str], Server]) -> None:
        self._start = start
        self._shared: dict[tuple[str, str], Server] = {}
        self._spares: dict[tuple[str, str], Future[Server]] = {}
        self._starter = ThreadPoolExecutor(1)

    def take(self, case: Case, kernel: str) -> Server:
        """Give the server for a case; `give_back` ends it if it is not shared."""
        key = case["setup"], kernel
        if case["server"] == "new":
            return self._fresh(key)
        server = self._shared.get(key)
        if server is None or server.process.poll() is not None:
            server = self._shared[key] = self._start(*key)
        return server

    def give_back(self, server: Server) -> None:
        """Say that a case is done with its server."""
        if server not in self._shared.values():
            with server:
                pass

    def _fresh(self, key: tuple[str, str]) -> Server:
        spare = self._spares.pop(key, None) or self._starter.submit(self._start, *key)
        if key[0] == "plain":
            self._spares[key] = self._starter.submit(self._start, *key)
        return spare.result()

    def close(self) -> None:
        """End all servers, each as it should end."""
        with ExitStack() as stack:
            for server in self._shared.values():
                stack.enter_context(server)
            for spare in self._spares.values():
                stack.enter_context(spare.result())
            self._starter.shutdown()
