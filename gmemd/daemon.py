"""The daemon: makes the parts, starts and stops them in order.

Start: what the service manager passed on, kernel, schema, objects (restored, then those of the command line),
sockets, READY=1; behind that, what was left out to start fast.
Stop: SHUTDOWN to the clients, sockets closed, what waits for custody settled, objects left to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from gmemd import __version__
from gmemd.changes.threads import close_copies, in_thread
from gmemd.commands.context import Gmemd
from gmemd.commands.dispatch import MODULES, Dispatcher
from gmemd.commands.lease import watch_leases
from gmemd.errors import QmpError
from gmemd.kernel.choose import choose_kernel
from gmemd.kernel.program import worker_program
from gmemd.kernel.syscalls import share_one_heap
from gmemd.objects.fds import NamedFds
from gmemd.observe.log import log, wait_written
from gmemd.persist.manager import Manager
from gmemd.persist.notify import Notifier
from gmemd.posix.sockets import bind_unix
from gmemd.qmp.session import Event
from gmemd.schema.validate import Schema
from gmemd.server.ahead import HeldDirectories
from gmemd.server.listener import Listener
from gmemd.server.monitor import Monitor
from gmemd.server.room import Room

if TYPE_CHECKING:
    from gmemd.web.address import Address
    from gmemd.web.server import HttpServer

# The dialect that is spoken: QEMU 11.1.
QEMU_VERSION = {"major": 11, "minor": 1, "micro": 0}

_GREETINGS = 0.02  # seconds in which those who waited for the start go first


class QmpSocket(NamedTuple):
    """One --qmp option."""

    path: str
    pretty: bool = False
    default: bool = False  # nobody asked for it: only where the service manager passes no socket


class Options(NamedTuple):
    """What the command line says."""

    qmp: tuple[QmpSocket, ...]
    objects: tuple[dict[str, Any], ...] = ()  # properties, as object-add takes them
    kernel: str = "auto"
    state_dir: str = ""
    persist: str = "auto"
    name: str | None = None
    uuid: str | None = None
    unstable_input: str = "accept"
    lab: bool = False  # the fault lab is there
    http: Address | None = None
    audit: str = ""  # a file, "-" for standard error; "": none


def package_version() -> str:
    """gmemd's version."""
    return __version__


class Daemon:
    """One running gmemd."""

    document = "qom.json"  # what is spoken
    names_stay = False  # the names of getfd are those of a socket, as in QEMU; else of a client

    def __init__(self, options: Options, manager: Manager | None = None) -> None:
        self._options = options
        self._monitors: set[Monitor] = set()
        self._listeners: list[Listener] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self._loading: list[asyncio.Future[None]] = []  # done when the thread that loads ahead is
        self._http: HttpServer | None = None
        self._stopped: asyncio.Event
        self._manager = manager or Manager.from_environ(os.environ)

    async def run(self) -> None:
        """Serve until `quit`, SIGTERM or SIGINT; QmpError when it cannot start."""
        self._loop = asyncio.get_running_loop()
        self._room = Room(self._loop)
        self._stopped = asyncio.Event()
        directories = HeldDirectories()
        worker_program()
        share_one_heap()
        log.call_later = self._loop.call_later
        self._loop.set_exception_handler(_log_exception)
        gmemd = self._gmemd = self._make_gmemd()
        try:
            sockets = self._restore()
            dispatcher = self._make_dispatcher()
            await self._start_http(dispatcher)
            await self._make_objects(dispatcher)
            self._listen(dispatcher, sockets)
            watch_leases(gmemd)
            for number in (signal.SIGTERM, signal.SIGINT):
                self._loop.add_signal_handler(number, gmemd.shutdown, "host-signal")
            self._loop.add_signal_handler(signal.SIGHUP, self._hang_up)
            log.info("ready", sockets=[listener.path for listener in self._listeners], kernel=gmemd.kernel.name,
                     why=gmemd.kernel.why, objects=len(gmemd.objects), persist=gmemd.custody.keeps)
            if self._http is not None:
                self._http.state.serving = True
                log.info("serving HTTP", url=self._http.url)
            gc.freeze()  # what is there now stays; collections need not look at it
            self._manager.serve(self._loop, gmemd.describe)
            gmemd.outlook.start()
            self._ready()
            self.spawn(self._load_ahead(directories))
            gmemd.settler.catch_up()
            await self._stopped.wait()
        finally:
            await self._close()

    async def _load_ahead(self, directories: HeldDirectories) -> None:
        """Load what a client may need, in a thread; whoever needs it sooner waits for it."""
        try:
            with directories:
                await asyncio.sleep(_GREETINGS)
                self._loading.append(
                    asyncio.ensure_future(in_thread(self._gmemd.schema.prepare, lambda: self._closing)))
                await asyncio.shield(self._loading[0])
            log.debug("loaded ahead")
        except Exception as exc:
            log.error("internal error", exc_info=exc)
        gc.freeze()
        gc.enable()

    def _make_gmemd(self) -> Gmemd:
        options, manager = self._options, self._manager
        kernel = choose_kernel(options.kernel)
        schema = Schema.load(self.document, unstable_input=options.unstable_input, lab=options.lab)
        faults = audit = None
        if options.lab:  # loaded only where it is asked for, as the audit
            from gmemd.lab import Lab, LabKernel, LabNotifier

            faults = lab = Lab()
            kernel = LabKernel(kernel, lab)
            manager.disturb(lambda notifier: cast(Notifier, LabNotifier(notifier, lab)))
        if options.audit:
            from gmemd.observe.audit import Audit

            audit = Audit(options.audit, schema.reading)
        custody = manager.custody(options.persist, options.state_dir, lambda fd: close_copies([fd]))
        return Gmemd(schema=schema, kernel=kernel, name=options.name, uuid=options.uuid, host=self, custody=custody,
                     manager=manager, lab=faults, audit=audit,
                     version={"qemu": QEMU_VERSION, "package": f"gmemd {package_version()}"})

    def _make_dispatcher(self) -> Dispatcher:
        if self._gmemd.lab is None:
            return Dispatcher(self._gmemd)
        from gmemd.commands import lab  # as _make_gmemd

        return Dispatcher(self._gmemd, (*MODULES, lab))

    def _hang_up(self) -> None:
        """On SIGHUP: open the audit's file anew, which log rotation may have moved away; else go on."""
        if self._gmemd.audit is not None:
            self._gmemd.audit.reopen()

    def _ready(self) -> None:
        """What is to be done once everything serves."""

    def _restore(self) -> list[socket.socket]:
        """Take over what a predecessor left; the listening sockets that came with it."""
        gmemd = self._gmemd
        restored = self._manager.restore(gmemd.custody, gmemd.kernel.identify)
        for words in restored.words:
            log.warning("restore", words=words)
        gmemd.adopt_restored(restored)
        return [socket.socket(fileno=fd) for _, fd in restored.sockets]

    async def _start_http(self, dispatcher: Dispatcher) -> None:
        """Serve HTTP, if it is asked for; only then are its libraries loaded."""
        if self._options.http is not None:
            from gmemd.web.server import HttpServer

            http = HttpServer(self._options.http, dispatcher, lambda: len(self._monitors))
            await http.start()
            self._http = http

    async def _make_objects(self, dispatcher: Dispatcher) -> None:
        """Make the objects of the command line, except those that a predecessor has left."""
        for properties in self._options.objects:
            if self._gmemd.objects.get(properties.get("id", "")) is None or not self._gmemd.custody.keeps:
                await dispatcher.at_start("object-add", properties)
                if self._gmemd.audit is not None:
                    self._gmemd.audit.own("object-add", properties)

    def _listen(self, dispatcher: Dispatcher, passed: list[socket.socket]) -> None:
        asked = {os.path.abspath(option.path): option for option in self._options.qmp}
        for sock in passed:
            option = asked.pop(sock.getsockname(), None)
            self._serve(dispatcher, sock, pretty=option is not None and option.pretty, remove=False)
        for option in asked.values():
            if passed and option.default:
                continue
            self._serve(dispatcher, bind_unix(option.path), pretty=option.pretty, remove=True)

    def _serve(self, dispatcher: Dispatcher, sock: socket.socket, *, pretty: bool, remove: bool) -> None:
        """Give each client of a listening socket, which is kept, a monitor; `remove` the socket file at the end."""
        named_fds = NamedFds() if self.names_stay else None

        def accepted(client: socket.socket, pretty: bool) -> None:
            try:
                self._monitors.add(Monitor(self._loop, client, dispatcher, pretty=pretty,
                                           closed=self._monitors.discard, room=self._room, named_fds=named_fds))
            except OSError:
                client.close()

        self._listeners.append(Listener(self._loop, sock, pretty=pretty, accepted=accepted, remove=remove))

    def emit(self, name: str, data: dict[str, Any]) -> None:
        counts = self._gmemd.counters.events
        counts[name] = counts.get(name, 0) + 1
        now = time.time()
        self._gmemd.events.append((now, name, data))
        event = Event(name, data, now)
        for monitor in self._monitors:
            monitor.emit(event)

    def stop(self) -> None:
        self._loop.call_soon(self._stopped.set)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        if self._closing:  # nothing begins any more
            work.close()
            return
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _close(self) -> None:
        self._closing = True
        self._manager.stopping()
        if self._http is not None:
            await self._http.close()
        for listener in self._listeners:
            listener.close()
        if self._tasks:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._gmemd.settler.idle()
        for monitor in list(self._monitors):
            monitor.close()
        with contextlib.suppress(QmpError):
            self._gmemd.custody.flush_blocking()
        self._gmemd.custody.close()
        if self._gmemd.audit is not None:
            self._gmemd.audit.close()
        # A thread inside a library when the interpreter ends would abort the process.
        await asyncio.gather(*self._loading, return_exceptions=True)
        self._gmemd.close()
        log.call_later = None
        wait_written()


def _log_exception(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log what no one has caught; asyncio's own logger would wait for whoever reads standard error."""
    log.error("internal error", desc=context["message"], exc_info=context.get("exception"))
