"""`gmemctl replace`: a running guest goes on in another QEMU, and its memory stays where it is.

The new QEMU is started beside the old one, waits for its state, and is compared with it; only then is the guest
stopped. The daemon has a note of both from before the new one exists, so that it can bring the move to an end if we
are killed.
"""

from __future__ import annotations

import os
import socket
import time
from argparse import Namespace
from contextlib import ExitStack
from typing import Any

from gmemd.cli.call_syntax import UsageError
from gmemd.cli.chosen import choose
from gmemd.cli.connection import DONE, Connection, note
from gmemd.cli.parser import ALL, COMMAND, DRY_RUN, Verbs, argument, socket_path
from gmemd.cli.verbs.handover import fill_in, placeholders
from gmemd.errors import QmpError
from gmemd.vmm.compare import Held, check_memory, check_movable, check_same, check_same_memory, machine_of
from gmemd.vmm.ending import VmmError
from gmemd.vmm.handover import Party, move, next_to, settle
from gmemd.vmm.qemu import Backend, Qemu
from gmemd.vmm.start import Started, arrange, reach

VERBS = Verbs()
_LAST_WORDS = 1.0  # seconds; for a VMM that could not load a state to say so, and end
_PATIENCE = 30.0  # seconds for each answer, if --timeout does not say


@VERBS.add(
    "let a running guest go on in another QEMU, on the same memory",
    argument("id", metavar="ID", nargs="*", completes="ids", help="all objects that are its memory; or a pattern"),
    ALL,
    argument("--qmp", metavar="PATH", type=socket_path, required=True, help="QMP socket of the QEMU in which it runs"),
    argument("--new-qmp", metavar="PATH", type=socket_path,
             help="QMP socket of the new one; default: the command's own, or that of the old one once it has ended"),
    DRY_RUN, COMMAND,
    examples=("replace vm1 --qmp vm1.sock -- qemu-system-x86_64 -m 1G "
              "-object memory-backend-file,id=ram,size=1G,share=on,mem-path={vm1} -machine q35,memory-backend=ram",),
    hints=((r"^the two VMMs are not the same machine",
            "repeat the old command, and name its machine type in full (pc-q35-7.2)"),
           (r" runs a guest on object .*: another guest ", "end that process, or move its guest: gmemctl replace"),
           (r" runs a guest on object '(.*)': deleting ",
            "end that process, or: gmemctl call memdev-delete id={} force=on")))
def replace(connection: Connection, options: Namespace) -> int:
    if not options.exec_command:
        raise UsageError("replace needs a command: gmemctl replace ID --qmp PATH -- COMMAND")
    ids, unmatched = choose(connection, options, connection.memory)
    if unmatched:
        raise unmatched[0]
    if not ids:
        raise UsageError("replace: name the objects that are the guest's memory")
    with ExitStack() as ends:
        replacement = Replacement(connection, options, ids, ends)
        replacement.check_old()
        if connection.dry_run:
            effect = (f"would move the guest of process {replacement.old.pid} into a new VMM, which is compared with "
                      "the old one first")
            _show(connection, ids, f"replace {effect}", {"command": "replace", "effect": effect, "complete": False})
            return DONE
        replacement.start()
        done = replacement.carry_out()
    stopped = f"; it was stopped for {done['stopped-ms']} ms" if "stopped-ms" in done else ""
    _show(connection, ids, f"the guest runs in process {done['pid']}, QMP socket {done['qmp']}{stopped}", done)
    return DONE


def _show(connection: Connection, ids: list[str], sentence: str, value: dict[str, Any]) -> None:
    if connection.for_people:
        print(sentence)
    else:
        connection.show([{"id": name} for name in ids] if connection.output == "name" else value)


class Replacement:
    """One replacement, step by step; `ends` closes what it opens."""

    def __init__(self, connection: Connection, options: Namespace, ids: list[str], ends: ExitStack) -> None:
        self._connection = connection
        self.ids = ids
        self._ends = ends
        self._timeout = options.timeout or _PATIENCE
        self._path = options.qmp
        if options.new_qmp == self._path:
            raise UsageError("replace: --new-qmp is the socket of the old one, which gets it by itself in the end")
        self._next = next_to(self._path)
        self._sizes = {name: connection.execute("query-memdev-status", {"id": name})[0]["size"] for name in ids}
        self._command = arrange(options.exec_command, options.new_qmp, self._next, incoming=True, taken=self._path)
        self.old = ends.enter_context(Qemu(self._path, self._timeout))
        self._was = ends.enter_context(Party.of(self.old.pid, self._path))

    def check_old(self) -> None:
        """Whether the guest can leave, and its memory is these objects."""
        check_movable(self.old)
        self.backends = self._check_memory(self.old)
        self.machine = machine_of(self.old)

    def start(self) -> None:
        """Start the new VMM, known to the daemon before it exists."""
        qmp = self._command.qmp
        if _is_served(qmp):
            raise VmmError(f"'{qmp}' is the socket of a VMM already: name another one with --new-qmp")
        values: dict[str, Any] = {}
        fds: dict[str, int] = {}
        for name in self.ids:
            values[name], [fds[name]] = self._connection.execute_fds("memdev-get-fd", {"id": name})
            self._ends.callback(os.close, fds[name])
        words = [fill_in(word, placeholders(values, fds)) for word in self._command.words]
        self._started = Started(words, list(fds.values()))
        try:
            self._is = self._ends.enter_context(Party.of(self._started.pid, qmp))
            self._connection.execute("memdev-handover", {
                "ids": self.ids, "old": {"pid": self.old.pid, "qmp": self._path},
                "new": {"pid": self._started.pid, "qmp": qmp}})
        except BaseException:
            self._started.kill()
            raise
        self._started.go()

    def carry_out(self) -> dict[str, Any]:
        """Move the guest; or let it go on where it was, and VmmError."""
        stopped, trouble, begun = None, None, False
        try:
            with reach(self._started, self._is.qmp, self._timeout) as new:
                self.check_new(new)
                begun = True
                stopped = self.transfer(new)
        except (VmmError, OSError, KeyboardInterrupt) as exc:
            trouble = exc
            if not begun:
                self._started.kill()
            elif isinstance(exc, VmmError) and not self._is.lives(_LAST_WORDS) and self._started.words():
                trouble = VmmError(f"the new VMM cannot take the guest: {self._started.words()}")
        self.old.close()
        result = settle(self._was, self._is, self._timeout, moved=stopped is not None)
        self._report(result)
        if result != "new":
            raise self._explained(trouble, result)
        qmp = self._path if self._is.qmp == self._next else self._is.qmp
        return {"ids": self.ids, "pid": self._started.pid, "qmp": qmp,
                **({} if stopped is None else {"stopped-ms": round(stopped * 1000)})}

    def transfer(self, new: Qemu) -> float:
        """Move the guest; how many seconds it was stopped. VmmError at any step."""
        return move(self.old, new)

    def check_new(self, new: Qemu) -> None:
        """Whether the new VMM can take the guest; VmmError if not."""
        if (status := new.status()) != "inmigrate":
            raise VmmError(f"the new VMM does not wait for a state (status: {status})")
        check_same_memory(self.old, self.backends, new, self._check_memory(new))
        check_same(self.machine, machine_of(new))

    def _check_memory(self, qemu: Qemu) -> dict[str, Backend]:
        held: dict[str, Held | None] = {}
        for name in self.ids:
            held[name] = next((Held(self._sizes[name], one["mapped"], one["writable"], one["private-copy"])
                               for one in self.holders(name) if one["pid"] == qemu.pid and one["mapped"]), None)
        return check_memory(qemu, held)

    def holders(self, name: str) -> list[dict[str, Any]]:
        """Who holds an object, by the kernel."""
        found: list[dict[str, Any]] = self._connection.execute("query-memdev-holders", {"id": name})
        return found

    def _report(self, result: str) -> None:
        """Tell the daemon, which may have been restarted meanwhile; if it does not come, it finds out by itself."""
        until = time.monotonic() + self._timeout
        while True:
            try:
                self._connection.execute("memdev-handover-end", {"id": self.ids[0], "result": result})
                return
            except QmpError:  # an answer that got lost
                return
            except OSError as exc:
                if time.monotonic() > until:
                    note(f"gmemd does not know yet where the guest runs: {exc}")
                    return
            self._connection.reconnect()
            time.sleep(0.05)

    def _explained(self, trouble: BaseException | None, result: str) -> BaseException:
        if trouble is not None and not isinstance(trouble, VmmError | OSError):
            return trouble
        where = {"old": "the guest runs in the old VMM as before",
                 "none": "the guest has ended with its VMM: its memory is kept, its devices' state is lost"}[result]
        return VmmError(f"{trouble or 'the new VMM has ended'}; {where}")


def _is_served(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except OSError as exc:
            raise VmmError(f"cannot use '{path}': {exc.strerror or exc}") from exc
        return True
