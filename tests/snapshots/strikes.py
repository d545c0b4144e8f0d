"""Strike the engine at one system call after the other, with SIGKILL or an error, and judge what is there then.

Each point is a fork of this process that does one act; the tracer of tests/robustness stops it at the n-th call.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from gmemd.errors import QmpError
from gmemd.snapshots.folder import remove, sweep
from gmemd.snapshots.tables import copy_data
from tests.robustness.sweep import can_fail
from tests.robustness.tracer import FIRST, Outcome, Tracer
from tests.snapshots.engine import MIB, PAGE, contents, memfd, opened
from tests.snapshots.here import do_here, restore_here, save_here

ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT)
SIZE = 17 * MIB
_SAID, _REFUSED, _CRASHED = 0, 3, 4  # exit statuses of the act


class Wrong(Exception):
    """A promise that was not kept."""


@dataclass
class Scene:
    """A root with the snapshots `p` and, for what changes one, `s`; the object that they are of."""

    root: Path
    fd: int
    target: int
    expected: dict[str, bytes]  # name -> what the snapshot holds

    def close(self) -> None:
        os.close(self.fd)
        os.close(self.target)


@dataclass(frozen=True)
class Act:
    """What is struck, and what may be there afterwards."""

    name: str
    do: Callable[[Scene], None]
    before: bool  # there is an `s` already
    may_be_absent: bool  # `s`, after a failure
    cold: bool = False
    drafts: bool = False


def _save(scene: Scene) -> None:
    save_here(scene.root, "s", scene.fd, state=b"devices")


def _increment(scene: Scene) -> None:
    save_here(scene.root, "s", scene.fd, parent="p")


def _restore(scene: Scene) -> None:
    restore_here(scene.root, "s", scene.target)


def _remove(scene: Scene) -> None:
    with opened(scene.root) as root:
        remove(root, "s")


def _sweep(scene: Scene) -> None:
    with opened(scene.root) as root:
        sweep(root)


ACTS = {act.name: act for act in (
    Act("save", _save, before=False, may_be_absent=True),
    Act("increment", _increment, before=False, may_be_absent=True),
    Act("restore", _restore, before=True, may_be_absent=False),
    Act("verify", lambda scene: do_here("verify", scene.root, "s"), before=True, may_be_absent=False),
    Act("flatten", lambda scene: do_here("flatten", scene.root, "s"), before=True, may_be_absent=False),
    Act("cold", lambda scene: do_here("cold", scene.root, "s"), before=True, may_be_absent=False),
    Act("flatten, compressed", lambda scene: do_here("flatten", scene.root, "s"), before=True, may_be_absent=False,
        cold=True),
    Act("remove", _remove, before=True, may_be_absent=True),
    Act("sweep", _sweep, before=True, may_be_absent=False, drafts=True),
)}


@dataclass
class Tally:
    """What was struck, and what came of it."""

    calls: Counter[str] = field(default_factory=Counter)
    results: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class Strikes:
    """One act below a folder; `strict`: raise the first wrong, else note it and go on."""

    def __init__(self, place: Path, act: Act, *, strict: bool = True) -> None:
        self._place, self._act, self._strict = place, act, strict
        self.tally = Tally()
        self._pristine = self._set(place / "pristine")
        self.length = self._learn()

    def close(self) -> None:
        self._pristine.close()
        shutil.rmtree(self._place)

    def kill_at(self, at: int) -> None:
        """SIGKILL at a call."""
        self._judged(at, 0)

    def fail_at(self, at: int, number: int) -> None:
        """Let a call fail with an errno: that one, or the next that can."""
        self._judged(at, number)

    def _learn(self) -> int:
        """How many calls the act takes."""
        scene = self._scene()
        outcome, status, said = self._strike(scene, 0, 0, lambda call: False)
        shutil.rmtree(scene.root)
        os.close(scene.target)
        if status != _SAID:
            raise Wrong(f"{self._act.name}: {said}")
        return len(outcome.calls)

    # -- striking ------------------------------------------------------------------------------------------------

    def _judged(self, at: int, number: int) -> None:
        scene, count = self._scene(), 0

        def may(call: str) -> bool:  # the first from `at` on that can fail so
            nonlocal count
            count += 1
            return count >= at and (not number or can_fail(call, number))

        try:
            outcome, status, said = self._strike(scene, FIRST, number, may)
            if not outcome.hit:
                return
            self.tally.calls[outcome.hit.removesuffix("*")] += 1
            try:
                self.tally.results[self._judge(scene, number, status, said)] += 1
            except (Wrong, QmpError, OSError) as exc:
                what = errno.errorcode[number] if number else "SIGKILL"
                words = f"{self._act.name}: {what} at call {at} ({outcome.hit}): {exc}"
                if self._strict:
                    raise Wrong(words) from exc
                self.tally.wrong.append(words)
        finally:
            shutil.rmtree(scene.root)
            os.close(scene.target)

    def _strike(self, scene: Scene, at: int, number: int, may: Callable[[str], bool]) -> tuple[Outcome, int, str]:
        """Do the act in a fork that is struck; its exit status, and the error that it ended with."""
        reader, writer = os.pipe()
        gate, go = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                with contextlib.suppress(OSError):  # it may be what is struck
                    os.read(gate, 1)
                self._act_here(scene, writer)
            finally:
                os._exit(0)
        os.close(writer)
        os.close(gate)
        status = _CRASHED

        def begin() -> None:
            os.write(go, b"x")

        try:
            outcome = Tracer(pid, at=at, error=number, may=may).run(begin, lambda: False)
            with os.fdopen(reader, "rb") as pipe:
                said = pipe.read().decode()
            status = int(said.partition("\n")[0] or -1)
            return outcome, status, said.partition("\n")[2]
        finally:
            os.close(go)
            with contextlib.suppress(ChildProcessError, ProcessLookupError):  # it was waited for as a traced one
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)

    def _act_here(self, scene: Scene, writer: int) -> None:
        """In the fork: do it, and say how it ended."""
        try:
            self._act.do(scene)
            words, status = "", _SAID
        except (QmpError, OSError) as exc:
            words, status = str(exc), _REFUSED
        except BaseException:
            words, status = traceback.format_exc(), _CRASHED
        with contextlib.suppress(OSError):
            os.write(writer, f"{status}\n{words}".encode())

    # -- before --------------------------------------------------------------------------------------------------

    def _set(self, root: Path) -> Scene:
        """The scene that each point begins with a copy of."""
        root.mkdir()
        fd = memfd(SIZE)
        os.pwrite(fd, b"parent" * 20000, MIB)
        os.pwrite(fd, b"the end", SIZE - 7)
        save_here(root, "p", fd)
        expected = {"p": contents(fd)}
        os.pwrite(fd, b"child" * 2000, MIB + 5 * PAGE)
        os.pwrite(fd, bytes(PAGE), SIZE - PAGE)
        expected["s"] = contents(fd)
        if self._act.before:
            save_here(root, "s", fd, parent="p")
        if self._act.cold:
            do_here("cold", root, "s")
        if self._act.drafts:
            for number in range(2):
                draft = root / f".x.tmp-0000000{number}"
                draft.mkdir()
                (draft / "memory.raw").write_bytes(b"half")
        return Scene(root, fd, memfd(SIZE), expected)

    def _scene(self) -> Scene:
        root = self._place / "root"
        shutil.copytree(self._pristine.root, root, copy_function=_copy)
        return Scene(root, self._pristine.fd, memfd(SIZE), self._pristine.expected)

    # -- judging -------------------------------------------------------------------------------------------------

    def _judge(self, scene: Scene, number: int, status: int, said: str) -> str:
        """Whole or absent, the object untouched, nothing left over; what happened, in a word."""
        if status == _CRASHED:
            raise Wrong(f"it did not expect this: {said}")
        if status == _REFUSED and os.strerror(number) not in said and self._act.name != "sweep":
            raise Wrong(f"it does not say why: {said}")
        if contents(scene.fd) != scene.expected["s"]:
            raise Wrong("the object was changed")
        with opened(scene.root) as root:
            sweep(root)
        found = sorted(os.listdir(scene.root))
        there = "s" in found
        if found not in (["p", "s"], ["p"]):
            raise Wrong(f"there is {found}")
        if not there and not self._act.may_be_absent:
            raise Wrong("it is gone")
        if status == _SAID and self._act.may_be_absent and there == self._act.before:
            raise Wrong("it was said to be done, and is not")
        for name in found:
            self._whole(scene, name)
        if self._act.name == "restore" and status == _SAID and contents(scene.target) != scene.expected["s"]:
            raise Wrong("it was said to be restored, and is not")
        return {_SAID: "done", _REFUSED: "error"}.get(status, "killed") + (", whole" if there else ", absent")

    def _whole(self, scene: Scene, name: str) -> None:
        do_here("verify", scene.root, name)
        fd = memfd(SIZE)
        try:
            restore_here(scene.root, name, fd)
            if contents(fd) != scene.expected[name]:
                raise Wrong(f"snapshot '{name}' holds something else")
        finally:
            os.close(fd)


def _copy(source: str, target: str) -> None:
    """Copy a file with its holes."""
    with open(source, "rb") as old, open(target, "wb") as new:
        size = os.fstat(old.fileno()).st_size
        os.ftruncate(new.fileno(), size)
        copy_data(old.fileno(), new.fileno(), size)


def sweep_all(place: Path, act: Act, *, step: int = 1, errors: tuple[int, ...] = (), strict: bool = True) -> Tally:
    """Strike every `step`-th call of an act: with SIGKILL, or, if there are any, with these errors in turn."""
    place.mkdir()
    strikes = Strikes(place, act, strict=strict)
    try:
        for turn, at in enumerate(range(step, strikes.length + 1, step)):
            if errors:
                strikes.fail_at(at, errors[turn % len(errors)])
            else:
                strikes.kill_at(at)
    finally:
        strikes.close()
    return strikes.tally
