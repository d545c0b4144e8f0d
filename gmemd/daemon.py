"""The daemon: creates its parts, starts and stops them in order.

Start: what the service manager passed, kernel, schema, objects (restored, then those of the command line), sockets,
READY=1; after that, what was left out for a fast start. Stop: SHUTDOWN to the clients, sockets closed, pending changes
settled, objects left to custody.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import time
import warnings
from _thread import get_ident
from collections.abc import Coroutine, Iterable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from gmemd import __version__
from gmemd.authority.gate import Gate
from gmemd.authority.rights import Rights
from gmemd.changes.threads import close_copies
from gmemd.commands.context import Gmemd
from gmemd.commands.dispatch import MODULES, Dispatcher
from gmemd.errors import QmpError
from gmemd.kernel.choose import choose_kernel
from gmemd.kernel.syscalls import share_one_heap
from gmemd.observe.log import log, wait_written
from gmemd.persist.manager import Manager
from gmemd.posix.sockets import bind_unix
from gmemd.qmp.session import Event
from gmemd.schema.validate import Schema
from gmemd.server.admission import Admission
from gmemd.server.ahead import HeldDirectories
from gmemd.server.doors import Doors, Listening
from gmemd.server.later import import_dataclasses
from gmemd.server.users import Users

if TYPE_CHECKING:
    from gmemd.commands.shelf import Shelves
    from gmemd.objects.rooms import MadeRoom
    from gmemd.persist.notify import Notifier
    from gmemd.web.address import Address
    from gmemd.web.server import HttpServer

# The dialect: QEMU 11.1.
QEMU_VERSION = {"major": 11, "minor": 1, "micro": 0}

_GREETINGS = 0.02  # seconds; clients that waited for the start go first


class QmpSocket(NamedTuple):
    """One --qmp option."""

    path: str
    pretty: bool = False
    default: bool = False  # not requested: used only if the service manager passes no socket


class Options(NamedTuple):
    """The options of the command line."""

    qmp: tuple[QmpSocket, ...]
    objects: tuple[dict[str, Any], ...] = ()  # properties, in the form of object-add
    kernel: str = "auto"
    state_dir: str = ""
    persist: str = "auto"
    name: str | None = None
    uuid: str | None = None
    unstable_input: str = "accept"
    lab: bool = False  # with the fault lab
    http: Address | None = None
    audit: str = ""  # a file, "-" for standard error; "": none
    snapshots: str = ""  # the directory for them; "": clients have to pass one
    policy: str = ""  # a file; "": none
    warm: bool = True  # load ahead what clients may need


def package_version() -> str:
    """gmemd's version."""
    return __version__


class Program(Protocol):
    """What a daemon runs."""

    schema: Schema
    modules: tuple[ModuleType, ...]  # with the functions of the commands
    gate: Gate | None  # None: everybody who can connect may do everything

    async def build(self, dispatcher: Dispatcher) -> None:
        """Create what exists from the start; QmpError if that is refused."""
        ...

    def sockets(self, passed: list[socket.socket]) -> Iterable[Listening]:
        """The sockets to listen on; `passed` came from the service manager."""
        ...

    def hang_up(self, gmemd: Gmemd) -> None:
        """Handle SIGHUP."""
        ...

    def ready(self) -> None:
        """Report that everything is served, to anybody but the service manager that waits for that."""
        ...


class Plain:
    """gmemd itself."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self.schema = Schema.load(unstable_input=options.unstable_input, lab=options.lab)
        self.modules = MODULES
        self.gate: Gate | None = Gate(options.policy, self.schema)
        if options.lab:  # loaded only on request
            from gmemd.commands import lab

            self.modules += (lab,)

    async def build(self, dispatcher: Dispatcher) -> None:
        """Create the objects of the command line, except those that a predecessor has left."""
        gmemd = dispatcher.gmemd
        for properties in self._options.objects:
            if gmemd.objects.get(properties.get("id", "")) is None or not gmemd.custody.keeps:
                await dispatcher.at_start("object-add", properties)
                if gmemd.audit is not None:
                    gmemd.audit.own("object-add", properties)

    def sockets(self, passed: list[socket.socket]) -> Iterator[Listening]:
        asked = {os.path.abspath(option.path): option for option in self._options.qmp}
        for sock in passed:
            option = asked.pop(sock.getsockname(), None)
            yield Listening(sock, pretty=option is not None and option.pretty)
        for option in asked.values():
            if not (passed and option.default):
                yield Listening(bind_unix(option.path), option.pretty, remove=True)

    def hang_up(self, gmemd: Gmemd) -> None:
        """Reopen the audit's file, which log rotation may have moved away."""
        if gmemd.audit is not None:
            gmemd.audit.reopen()

    def ready(self) -> None:
        pass


class Daemon:
    """A running gmemd, or another program around its objects."""

    def __init__(self, options: Options, manager: Manager | None = None, program: Program | None = None) -> None:
        """Without `program` it is gmemd."""
        self._options = options
        self._program = program or Plain(options)
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self._dispatcher: Dispatcher | None = None
        self._http: HttpServer | None = None
        self._stopped: asyncio.Event
        self._manager = manager or Manager(os.environ)

    async def run(self) -> None:
        """Serve until `quit`, SIGTERM or SIGINT; QmpError when it cannot start."""
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        directories = HeldDirectories()
        share_one_heap()
        self._loop.set_exception_handler(_log_exception)
        gmemd = self._gmemd = self._make_gmemd()
        self._admission = Admission(self._program.gate, gmemd)
        self._doors = Doors(self._loop, Users(self._loop), self._admission)
        log.call_later = self._loop.call_later
        try:
            sockets = self._restore()
            dispatcher = self._dispatcher = Dispatcher(gmemd, self._program.modules)
            self._doors.serve(dispatcher)
            await self._start_http(dispatcher)
            await self._program.build(dispatcher)
            await self._open_rooms()
            for listening in self._program.sockets(sockets):
                self._doors.open(listening)
            for room in (gmemd, *gmemd.rooms.values()):
                _resume(room)
            for number in (signal.SIGTERM, signal.SIGINT):
                self._loop.add_signal_handler(number, gmemd.shutdown, "host-signal")
            self._loop.add_signal_handler(signal.SIGHUP, self._hang_up)
            if self._program.gate is not None:
                log.info("policy", words=self._program.gate.words)
            log.info("ready", sockets=self._doors.paths, kernel=gmemd.kernel.name,
                     why=gmemd.kernel.why, objects=len(gmemd.seen()), persist=gmemd.custody.keeps)
            if self._http is not None:
                self._http.state.serving = True
                log.info("serving HTTP", url=self._http.url)
            gc.freeze()  # what exists now stays; collections need not examine it
            self._manager.serve(self._loop, gmemd.describe)
            if gmemd.custody.keeps or self._manager.keeping.manager == "systemd":
                gmemd.outlook.start()
            self._program.ready()
            dispatcher.loader.loads_nothing = get_ident()
            dispatcher.loader.first = import_dataclasses
            self.spawn(self._load_ahead(dispatcher, directories))
            gmemd.settler.catch_up()
            await self._stopped.wait()
        finally:
            await self._close()

    def _hang_up(self) -> None:
        self._program.hang_up(self._gmemd)
        if self._admission.by_policy:
            self.spawn(self._admission.reload(self._doors.monitors))

    async def _load_ahead(self, dispatcher: Dispatcher, directories: HeldDirectories) -> None:
        """Have loaded what clients may need, or with --warm off what one has needed; who needs it sooner waits."""
        try:
            with directories:
                if self._options.warm:
                    await asyncio.sleep(_GREETINGS)
                    with contextlib.suppress(QmpError):  # there is no thread: it is tried again when it is needed
                        await dispatcher.loader.load()
                else:
                    gc.enable()
                await self._look_at_snapshots(dispatcher)
                await dispatcher.loader.loaded.wait()
            log.debug("loaded ahead")
        except Exception as exc:
            log.error("internal error", exc_info=exc)
        gc.freeze()
        gc.enable()

    async def _look_at_snapshots(self, dispatcher: Dispatcher) -> None:
        """See what is in the directories of snapshots, and free what a predecessor has left there."""
        rooms = [self._gmemd, *self._gmemd.rooms.values()]
        found: list[Shelves] = []

        def load() -> None:
            found.extend(room.snapshots for room in rooms if os.path.isdir(room.snapshots_path))

        with contextlib.suppress(QmpError):  # there is no thread
            await dispatcher.loader.once("snapshots", load)
        for shelves in found:
            self.spawn(shelves.load())

    def _make_gmemd(self) -> Gmemd:
        options, manager, schema = self._options, self._manager, self._program.schema
        kernel = choose_kernel(options.kernel)
        faults = audit = None
        if options.lab:  # loaded only on request, as the audit
            from gmemd.lab import Lab, LabKernel, LabNotifier

            faults = lab = Lab()
            kernel = LabKernel(kernel, lab)
            manager.disturb(lambda notifier: cast("Notifier", LabNotifier(notifier, lab)))
        if options.audit:
            from gmemd.observe.audit import Audit

            audit = Audit(options.audit, schema.commands.keys() - schema.reading)
        custody = manager.custody(options.persist, options.state_dir, lambda fd: close_copies([fd]))
        ledger = None
        if self._program.gate is not None and self._program.gate.policy is not None:
            from gmemd.authority.ledger import Ledger

            ledger = Ledger()
        return Gmemd(schema=schema, kernel=kernel, name=options.name, uuid=options.uuid, host=self, custody=custody,
                     ledger=ledger,
                     manager=manager, lab=faults, audit=audit, snapshots=options.snapshots,
                     version={"qemu": QEMU_VERSION, "package": f"gmemd {package_version()}"})

    def _restore(self) -> list[socket.socket]:
        """Take over what a predecessor left; the listening sockets that came with it."""
        gmemd = self._gmemd
        restored = self._manager.restore(gmemd.custody, gmemd.kernel.identify)
        if restored is None:
            return []
        for words in restored.words:
            log.warning("restore", words=words)
        if restored.objects or restored.lost or restored.unclaimed:
            from gmemd.commands.charging import charge_again
            from gmemd.commands.returning import adopt_restored

            adopt_restored(gmemd, restored)
            charge_again(gmemd)
        return [socket.socket(fileno=fd) for _, fd in restored.sockets]

    async def _open_rooms(self) -> None:
        """Let clients into the made rooms that came back."""
        for room in [room for room in self._gmemd.rooms.values() if room.made is not None]:
            from gmemd.commands.housing import open_again

            await open_again(room)

    async def _start_http(self, dispatcher: Dispatcher) -> None:
        """Serve HTTP, if requested; only then are its libraries loaded."""
        if self._options.http is not None:
            from gmemd.web.server import HttpServer

            http = HttpServer(self._options.http, dispatcher, lambda: len(self._doors.monitors),
                              admit=self._admission.admit_http)
            await http.start()
            self._http = http

    def emit(self, name: str, data: dict[str, Any]) -> None:
        counts = self._gmemd.counters.events
        counts[name] = counts.get(name, 0) + 1
        self.emit_in(self._gmemd, name, data)

    def emit_in(self, room: Gmemd, name: str, data: dict[str, Any]) -> None:
        now = time.time()
        room.events.append((now, name, data))
        event = Event(name, data, now)
        for monitor in self._doors.monitors:
            if monitor.room is room:
                monitor.emit(event)

    def rights_in(self, made: MadeRoom) -> Rights:
        return self._admission.rights_in(made)

    def open_room(self, room: Gmemd, listener: socket.socket | None) -> None:
        self._doors.open_room(room, listener)

    def close_room(self, room: Gmemd) -> None:
        self._doors.close_room(room)

    def clear_room(self, room: Gmemd) -> None:
        self._doors.clear_room(room)

    def clients_in(self, room: Gmemd) -> int:
        return self._doors.clients_in(room)

    def stop(self) -> None:
        self._loop.call_soon(self._stopped.set)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        if self._closing:  # nothing starts any more
            work.close()
            return
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _close(self) -> None:
        self._closing = True
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)  # what no longer begins
        self._manager.stopping()
        if self._http is not None:
            await self._http.close()
        self._doors.close()
        if self._tasks:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._gmemd.settler.idle()
        self._doors.disconnect()
        self._gmemd.custody.copies.ask(self._gmemd.kept)
        with contextlib.suppress(QmpError):
            self._gmemd.custody.flush_blocking()
        if words := self._manager.leave(self._gmemd.custody):
            log.error("restore", words=words)
        self._gmemd.custody.close()
        if self._gmemd.audit is not None:
            self._gmemd.audit.close()
        # A thread inside a library when the interpreter ends would abort the process.
        if self._dispatcher is not None and self._dispatcher.loader.loading:
            await asyncio.wait(self._dispatcher.loader.loading.values())
        self._gmemd.close()
        log.call_later = None
        wait_written()


def _resume(room: Gmemd) -> None:
    """Watch and finish what a predecessor has left in a room."""
    if any(one.lease or one.runner or one.handover or one.fence is not None for one in room.objects):
        from gmemd.commands.rest import resume

        resume(room)


def _log_exception(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log uncaught exceptions; asyncio's own logger would wait for the reader of standard error."""
    log.error("internal error", desc=context["message"], exc_info=context.get("exception"))
