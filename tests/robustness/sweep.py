"""Strike a scenario at one system call after the other, and hold what is there afterwards against what was promised."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from gmemd.errors import QmpError
from tests.robustness.scenarios import SIZE, STANDING, Scenario, add, convert, delete
from tests.robustness.tracer import Outcome
from tests.robustness.world import Link, Request, State, World, Wrong, look, write_pattern

ERRORS = (errno.ENOSPC, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EINTR, errno.EACCES)

# What has no error of that kind, or whose error ends the C library (a futex) or goes unseen in asyncio's own wake-up.
_NEVER_FAIL = frozenset({
    "futex", "rt_sigprocmask", "rt_sigaction", "rseq", "set_robust_list", "exit", "getpid", "gettid", "munmap",
    "mprotect", "madvise", "brk", "sched_yield", "clock_nanosleep", "clock_gettime", "getuid", "geteuid", "epoll_wait",
})
_LIMITED = {"mmap": (errno.ENOMEM, errno.ENFILE), "clone3": (errno.ENOMEM,), "clone": (errno.ENOMEM,),
            "recvfrom": (errno.EINTR,)}
_SOON = 20.0  # seconds
_WAKE_UP = "sendto*"  # of a worker to the event loop


def can_fail(call: str, number: int) -> bool:
    """Can this call, as Outcome.calls names it, give that errno without making a nonsense of the C library?"""
    name = call.removesuffix("*")
    if call == _WAKE_UP:
        return number == errno.EINTR
    if name in _LIMITED:
        return number in _LIMITED[name]
    return name not in _NEVER_FAIL


def _soon(judge: Callable[[], None]) -> None:
    """Judge once more until it is right: copies of a file's descriptor are closed off the loop."""
    end = time.monotonic() + _SOON
    while True:
        try:
            judge()
            return
        except Wrong:
            if time.monotonic() > end:
                raise
        time.sleep(0.01)


@dataclass
class Tally:
    """What was struck, and what came of it."""

    points: int = 0
    results: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def count(self, call: str, result: str) -> None:
        self.points += 1
        self.results[result] += 1
        self.calls[call.removesuffix("*")] += 1

    def __iadd__(self, other: Tally) -> Tally:
        self.points += other.points
        self.results += other.results
        self.calls += other.calls
        self.wrong += other.wrong
        return self


class Sweep:
    """One world and one scenario. `strict`: raise the first wrong, else note it and go on."""

    def __init__(self, world: World, scenario: Scenario, *, strict: bool = True) -> None:
        self.world = world
        self._scenario = scenario
        self._strict = strict
        self.tally = Tally()
        self.client = world.client()
        self._link = Link(world.socket)
        self._stand()
        self._clear()
        self.length = self._learn()  # in system calls

    def close(self) -> None:
        self.client.close()
        self._link.close()

    # -- striking --------------------------------------------------------------------------------------------

    def kill_at(self, at: int) -> bool:
        """SIGKILL at a call; False: the scenario was over before, and the kill came after it."""
        before = self._prepare()
        outcome, replies = self._act(at)
        if not outcome.dead:
            outcome.hit = ""
            self.world.kill()
        self._reconnect()
        try:
            if outcome.hung:
                raise Wrong("it hangs")
            self._judge_kill(before, replies)
        except Wrong as exc:
            return self._note(outcome, at, 0, str(exc))
        finally:
            self._clear()
        self.tally.count(outcome.hit or "after the reply",
                         "acknowledged" if self._all_acknowledged(replies) else "not acknowledged")
        return outcome.reached

    def fail_at(self, at: int, number: int, *, only: str = "") -> bool:
        """Make a call fail with an errno; False: it cannot fail so, or the scenario was over before.

        `only`: such a call, the first of them if `at` is FIRST.
        """
        before, opened = self._prepare(), self.world.opened()
        outcome, replies = self._act(at, number, only)
        if outcome.dead or outcome.hung:
            self._reconnect()
            self._clear()
            what = "it hangs" if outcome.hung else f"it has ended: {self.world.log()[-2000:]}"
            return self._note(outcome, at, number, what)
        closed = self._link.closed
        if closed:
            self._link.close()
            self._link = Link(self.world.socket)
        if outcome.hit == "sendto":
            self._renew_client()
        try:
            if closed and outcome.hit not in ("recvmsg", "sendto", "sendmsg"):
                raise Wrong("it has closed the connection")
            self._judge_error(before, replies, number, closed=closed)
            self._clear()
            _soon(lambda: self._judge_count(opened - self._held))
        except Wrong as exc:
            self._clear()
            return self._note(outcome, at, number, str(exc))
        if outcome.reached:
            self.tally.count(outcome.hit, "closed" if closed else
                             "success" if self._all_acknowledged(replies) else "error")
        return outcome.reached

    def _note(self, outcome: Outcome, at: int, number: int, words: str) -> bool:
        what = errno.errorcode[number] if number else "killed"
        text = f"{self._scenario.name}: {what} at call {at} ({outcome.hit}): {words}"
        if self._strict:
            raise Wrong(text)
        self.tally.count(outcome.hit, "wrong")
        self.tally.wrong.append(text)
        if self.world.process.poll() is not None:
            raise Wrong("the keeper has ended")
        return True

    def _act(self, at: int, number: int = 0, only: str = "") -> tuple[Outcome, list[dict[str, Any]]]:
        fd = os.memfd_create("passed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) if self._scenario.passes_fd else -1
        try:
            if fd >= 0:
                os.truncate(fd, SIZE)
                os.pwrite(fd, b"passed" * 100, 0)
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            first = len(self._link.replies)
            outcome = self.world.trace(self._link, self._filled(self._scenario.requests), [fd] if fd >= 0 else None,
                                       at=at, error=number,
                                       may=lambda call: only in ("", call) and (not number or can_fail(call, number)))
            return outcome, self._link.replies[first:]
        finally:
            if fd >= 0:
                os.close(fd)

    # -- before ----------------------------------------------------------------------------------------------

    def _filled(self, requests: list[Request]) -> list[Request]:
        return [(name, self._in_place(arguments)) for name, arguments in requests]

    def _in_place(self, given: Any) -> Any:
        """Arguments with the place for files in every path."""
        if isinstance(given, list):
            return [self._in_place(one) for one in given]
        if not isinstance(given, dict):
            return given
        return {key: value.format(files=self.world.files) if key in ("mem-path", "socket") else self._in_place(value)
                for key, value in given.items()}

    def _do(self, requests: list[Request]) -> None:
        for name, arguments in self._filled(requests):
            self.client.execute(name, arguments)

    def _stand(self) -> None:
        """The objects that nobody touches."""
        there = {entry["id"] for entry in self.client.execute("query-memdev")}
        for request in STANDING:
            if request[1]["id"] not in there:
                self._do([request])
                write_pattern(self.client, request[1]["id"])
        if "stays-too" not in there:
            self._do([convert("stays-too", "private", SIZE // 2, SIZE // 4)])

    def _prepare(self) -> State:
        """Make what the scenario needs; the state then."""
        self._do(self._scenario.before)
        for name, arguments in self._scenario.before:
            if name == "object-add":
                write_pattern(self.client, arguments["id"])
        self._shared = look(self.client) if self._scenario.shares else State()
        self._do(self._scenario.then)
        state = look(self.client)
        _soon(self._judge_copies)
        self._files = self._left()
        self._held = len(self.world.memory()[1]) - self._standing_fds if self._scenario.before else 0
        self._held += sum(name == "memdev-room-add" for name, _ in self._scenario.before)
        return state

    def _left(self) -> list[str]:
        """What is in the place for files, without the locks of sockets, which the next one takes over."""
        return [name for name in os.listdir(self.world.files) if not name.endswith(".gmemd-lock")]

    def _clear(self) -> None:
        """Take away whatever a scenario has left."""
        for entry in self.client.execute("query-memdev"):
            if not entry["id"].startswith("stays"):
                self._do([("memdev-delete", {"id": entry["id"], "force": True})])  # a template, too
        for entry in self.client.execute("query-memdev-rooms"):
            self._do([("memdev-room-del", {"id": entry["id"]})])
        for entry in self.client.execute("query-fdsets"):
            self.client.execute("remove-fd", {"fdset-id": entry["fdset-id"]})
        if self._scenario.passes_fd and not self._link.closed:  # the name is the client's own
            count = len(self._link.replies) + 1
            self._link.send([("closefd", {"fdname": "f"})])
            self._link.wait(count)
        for name in os.listdir(self.world.files):
            os.unlink(self.world.files / name)
        self._standing_fds = len(self.world.memory()[1])

    def _learn(self) -> int:
        """How many calls the scenario takes; the state that it leads to is noted."""
        self._prepare()
        outcome, replies = self._act(0)
        if not self._all_acknowledged(replies):
            raise Wrong(f"{self._scenario.name}: {replies}")
        self._after = look(self.client)
        self._clear()
        return len(outcome.calls)

    def _renew_client(self) -> None:
        """An event that could not be sent to the bystander has cut it off."""
        try:
            self.client.execute("query-status")
        except ConnectionError:
            self.client.close()
            self.client = self.world.client()

    def _reconnect(self) -> None:
        self.close()
        self.client = self.world.client()
        self._link = Link(self.world.socket)

    # -- judging ---------------------------------------------------------------------------------------------

    def _all_acknowledged(self, replies: list[dict[str, Any]]) -> bool:
        return len(replies) == len(self._scenario.requests) and all("return" in reply for reply in replies)

    def _judge_kill(self, before: State, replies: list[dict[str, Any]]) -> None:
        """After a kill: what was acknowledged stands; what was not has happened or has not."""
        now = look(self.client)
        for reply in replies:
            if "return" not in reply:
                raise Wrong(f"refused: {reply}")
        acknowledged = self._touched(len(replies))
        for object_id in {*before.objects, *self._after.objects, *now.objects}:
            self._judge_object(object_id, before, now, must=object_id in acknowledged,
                               may=object_id not in acknowledged, kept=False)
        self._judge_together(before, now)
        self._judge_rest(now, fdsets=[])
        self._settle(now)

    def _judge_error(self, before: State, replies: list[dict[str, Any]], number: int, *, closed: bool) -> None:
        """After an error: what was answered is so; what was refused has not happened, in words that tell why."""
        refused = [reply for reply in replies if "error" in reply]
        for index, reply in enumerate(refused):
            follows = index > 0 and reply["error"]["desc"].endswith("not found")
            if not follows and not _says(reply["error"]["desc"], number):
                raise Wrong(f"the reply does not say '{os.strerror(number)}': {reply['error']['desc']}")
        if replies and not any("return" in reply for reply in replies) and self._left() != self._files:
            raise Wrong(f"it has left {os.listdir(self.world.files)}")
        if any("internal error" in reply.get("error", {}).get("desc", "") for reply in replies):
            raise Wrong(f"it did not expect this: {self.world.log().splitlines()[-1][-300:]}")
        if len(replies) < len(self._scenario.requests) and not closed:
            raise Wrong(f"{len(replies)} replies to {len(self._scenario.requests)} requests")
        now = look(self.client)
        answers = ["return" in reply for reply in replies]
        good = self._touched(len(replies), answers)
        for object_id in {*before.objects, *self._after.objects, *now.objects}:
            if refused and self._last(object_id, answers) in ("object-add", "object-del"):
                if (self._last(object_id, answers) == "object-add") != (object_id in now.objects):
                    raise Wrong(f"object '{object_id}' is {_short(now.of(object_id))} after {replies}")
            else:
                self._judge_object(object_id, before, now, must=object_id in good, may=closed, kept=True)
        self._judge_together(before, now)
        fdsets = [entry["fdset-id"] for entry in now.fdsets]
        if fdsets not in ([], [entry["fdset-id"] for entry in self._after.fdsets]):
            raise Wrong(f"fd sets {now.fdsets}")
        self._judge_rest(now, fdsets=now.fdsets)
        self._settle(now)

    def _last(self, object_id: str, good: list[bool]) -> str:
        """The last request about an object that went well."""
        names = [name for (name, arguments), well in zip(self._scenario.requests, good, strict=False)
                 if well and arguments.get("id") == object_id]
        return names[-1] if names else ""

    def _touched(self, count: int, good: list[bool] | None = None) -> set[str]:
        """The objects of the first requests, if these went well."""
        found = set()
        for index, (_, arguments) in enumerate(self._scenario.requests[:count]):
            if good is None or good[index]:
                found |= _named(arguments)
        return found

    def _judge_together(self, before: State, now: State) -> None:
        """All that one transaction has touched is as before, or all is as it should become."""
        for name, arguments in self._scenario.requests:
            if name == "memdev-transaction":
                changed = {object_id: now.of(object_id) == self._after.of(object_id) for object_id in _named(arguments)
                           if before.of(object_id) != self._after.of(object_id)}
                if len(set(changed.values())) > 1:
                    raise Wrong(f"half a transaction: {changed}")

    def _judge_object(self, object_id: str, before: State, now: State, *, must: bool, may: bool, kept: bool) -> None:
        was, wanted, found = before.of(object_id), self._after.of(object_id), now.of(object_id)
        if not kept and object_id not in self._kept_after and must:
            wanted = None
        allowed = [wanted] if must else [was, wanted] if may else [was]
        if not kept and not (self._scenario.outlives and (must or object_id not in self._after.objects
                                                    or object_id in self._kept_after)):
            allowed.append(None)
        if found not in allowed:
            raise Wrong(f"object '{object_id}' is {_short(found)}, not {' or '.join(map(_short, allowed))}")

    @property
    def _kept_after(self) -> set[str]:
        """What outlives the daemon afterwards."""
        given_up = {arguments["id"] for name, arguments in self._scenario.requests
                    if name == "memdev-persist" and not arguments["persist"]}
        return set(self._after.objects) - given_up

    def _judge_rest(self, now: State, *, fdsets: list[Any]) -> None:
        if now.lost or now.unclaimed:
            raise Wrong(f"lost {now.lost}, unclaimed {now.unclaimed}")
        if [entry["fdset-id"] for entry in now.fdsets] != [entry["fdset-id"] for entry in fdsets]:
            raise Wrong(f"fd sets {now.fdsets}")
        if self.world.damaged():
            raise Wrong(f"the registry was damaged: {self.world.damaged()}")

    def _settle(self, now: State) -> None:
        """The next command works, and what is owed is done with it; then no descriptor is too many."""
        try:
            self._do([add("shm", "next"), delete("next")])
        except QmpError as exc:
            raise Wrong(f"the next command fails: {exc}") from exc
        if self._scenario.shares and self._scenario.shares in now.objects:
            self._judge_private(self._scenario.shares)
        _soon(lambda: self._judge_memory(now))

    def _judge_copies(self) -> None:
        """What was handed out to be looked at is closed."""
        found = self.world.memory()[1]
        if len(set(found)) < len(found):
            raise Wrong(f"copies are open: {found}")

    def _judge_count(self, right: int) -> None:
        if (found := self.world.opened()) != right:
            raise Wrong(f"{found - right} descriptors too many")

    def _judge_memory(self, now: State) -> None:
        """Keeper and daemon have what they should have."""
        kept, opened = self.world.memory()
        inodes = Counter(now.inodes.values())
        for who, fds in (("the keeper", kept), ("the daemon", opened)):
            own = Counter(int(entry.split()[0]) for entry in fds if "[private]" not in entry and "passed" not in entry)
            passed = sum("passed" in entry for entry in fds)
            if who == "the keeper" and not self._complete(own, inodes, now):
                raise Wrong(f"{who} holds {fds} for {now.inodes}")
            if who == "the daemon" and own != inodes - Counter(self._passed(now)):
                raise Wrong(f"{who} holds {fds} for {now.inodes}")
            if passed > 1:
                raise Wrong(f"{who} holds {fds}")
        private = [entry for entry in opened if "[private]" in entry]
        if private != [entry for entry in kept if "[private]" in entry]:
            raise Wrong(f"private bytes are in {private}, kept are {kept}")

    def _passed(self, now: State) -> list[int]:
        return [now.inodes["x"]] if self._scenario.passes_fd and "x" in now.inodes else []

    def _complete(self, own: Counter[int], inodes: Counter[int], now: State) -> bool:
        """Does the keeper hold each kept object once and nothing else?"""
        wanted = inodes - Counter(self._passed(now))
        persist = any(name == "memdev-persist" for name, _ in [*self._scenario.requests, *self._scenario.then])
        if persist and "x" in now.inodes and own != wanted:
            wanted -= Counter([now.inodes["x"]])
        return own == wanted

    def _judge_private(self, object_id: str) -> None:
        """Everything made shared again is as it was filled."""
        self._do([convert(object_id, "shared")])
        if look(self.client).contents[object_id] != self._shared.contents[object_id]:
            raise Wrong("preserved bytes are lost")


def _named(arguments: dict[str, Any]) -> set[str]:
    """The objects that a request, or each action of a transaction, is about."""
    if "actions" in arguments:
        return set().union(*(_named(action["data"]) for action in arguments["actions"]))
    return {arguments.get("id") or str(arguments.get("path", "")).rpartition("/")[2]}


def _says(desc: str, number: int) -> bool:
    """Does an error tell the errno? Of SQLite's there is only the code, and threads know two only."""
    coarse = (f"{os.strerror(errno.EIO)} (SQLITE_IOERR", "(SQLITE_CANTOPEN", os.strerror(errno.EAGAIN),
              f"cannot start a thread: {os.strerror(errno.ENOMEM)}")
    return os.strerror(number) in desc or any(words in desc for words in coarse)


def _short(found: tuple[Any, ...] | None) -> str:
    return "absent" if found is None else f"<{found}>"


def kills(world: World, scenario: Scenario, *, step: int = 1, first: int = 1, strict: bool = True) -> Tally:
    """SIGKILL at every call of a scenario (every `step`-th from `first` on)."""
    sweep = Sweep(world, scenario, strict=strict)
    at = first
    try:
        while sweep.kill_at(at):
            at += step
    finally:
        sweep.close()
    return sweep.tally


def errors(world: World, scenario: Scenario, *, step: int = 1, first: int = 0, strict: bool = True) -> Tally:
    """Every errno at every call of a scenario (every `step`-th of these, `first` < step) that can fail."""
    sweep = Sweep(world, scenario, strict=strict)
    count = 0
    try:
        for number in ERRORS:
            at = 1
            while at <= sweep.length:
                count += 1
                if count % step == first:
                    sweep.fail_at(at, number)
                at += 1
    finally:
        sweep.close()
    return sweep.tally
