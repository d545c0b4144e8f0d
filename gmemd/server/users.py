"""What the clients of one user may make gmemd hold, so that they are in nobody's way but each other's.

Shared as in objects/shares.py:
- connections: one too many is told why and hung up on;
- unread output, weighed as in outgoing.py, and unwanted descriptors that are being closed. A user with more than its
  share is *full*: nothing is read from its clients and their requests wait, until it has no more than half of what it
  may have. Meanwhile a client that has read nothing for FULL_SECONDS, and one that would get an event on top of much
  unread output, is disconnected;
- descriptors with names (objects/fds.py);
- descriptors in flight, sent and not yet received: replies with more of them wait.
Not shared, because they take no more than so much of a user:
- half messages: when they add up to HALVES, a message is large as soon as it has more than _LITTLE (room.py);
- commands that wait, each of which may take a thread: LONG_MAX at a time, others queue;
- threads that close unwanted descriptors: _CLOSERS at a time, others queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final, Protocol

from gmemd.authority.ledger import Amounts, refuse_above
from gmemd.changes.threads import beside, close_beside
from gmemd.errors import QmpError
from gmemd.kernel.syscalls import return_free_memory
from gmemd.objects.shares import Pool, Share, of_descriptors
from gmemd.posix.sockets import unread
from gmemd.server.room import LARGE, Room
from gmemd.server.turns import Turns

FDS_MAX: Final = 253  # that come at once: SCM_MAX_FD of the kernel; QEMU accepts 16
HIGH_WATER: Final = 1 << 20  # weight of a client's unread output from which its requests wait
UNREAD_MAX: Final = 256 << 20  # of all users together
FULL_SECONDS: Final = 1.0
HALVES: Final = 64 << 20  # weight
LONG_MAX: Final = 256
_LITTLE: Final = 4 << 10
_CLOSERS: Final = 8
_MUCH: Final = 16 << 20  # weight of unread output after which the heap is worth trimming
_CROWD: Final = 512  # clients after which it is, too
_SHRINK_SECONDS: Final = 0.5
_A_TURN: Final = 8  # clients that are disconnected before others have their turn
_RECOUNT_SECONDS: Final = 0.05
_UNDELIVERED_SECONDS: Final = 1.0  # between two looks whether a client that is cut has received its descriptors


class Member(Protocol):
    """A client of a user."""

    def resume(self) -> None:
        """Answer and read again, if nothing else prevents it."""

    def pause(self) -> None:
        """Read no more."""

    def close(self) -> None:
        """Disconnect it."""

    def silent_for(self) -> float:
        """For how long (seconds) it has not read any of its output; 0 if it has none."""

    def recount(self) -> None:
        """Count its descriptors in flight again."""


class User:
    """One user's clients and what they hold."""

    def __init__(self, account: str, users: Users, limits: Amounts) -> None:
        self.account = account
        self.clients = Share(users.clients)
        self.unread = Share(users.unread)
        self.closing = Share(users.closing)
        self.named = Share(users.named)
        self.in_flight = Share(users.in_flight)
        self.limit(limits)
        self.room = Room(users.loop)
        self.long = asyncio.Semaphore(LONG_MAX)
        self.high_water = HIGH_WATER  # less than 0 while it is full
        self.large = LARGE
        self._halves = 0
        self._members: set[Member] = set()
        self._users = users
        self._loop = users.loop
        self._closers = 0  # threads
        self._to_close: deque[tuple[list[int], Callable[[], None]]] = deque()
        self._recounted = 0.0  # when, by the loop's clock

    @property
    def full(self) -> bool:
        return self.high_water < 0

    def limit(self, limits: Amounts) -> None:
        """Set the limits of a policy."""
        self.clients.limit, self.unread.limit = limits.get("clients"), limits.get("queued")
        self.named.limit, self.in_flight.limit = limits.get("fds-held"), limits.get("fds-in-flight")

    def holds(self, what: str) -> int:
        """For its account: how much of what is shared its clients have."""
        share = {"clients": self.clients, "queued": self.unread, "fds-held": self.named,
                 "fds-in-flight": self.in_flight}.get(what)
        return 0 if share is None else share.taken

    def check_room(self) -> None:
        """Refuse a connection that is one too many."""
        if self.clients.limit is not None:
            refuse_above("clients", self.clients.limit, self.clients.taken, 1)
        if not self.clients.allows(1):
            raise QmpError(f"this user has {self.clients.taken} connections already, the most it may have now")

    def join(self, member: Member) -> None:
        """Count a connection."""
        self.clients.take(1)
        self._users.crowd = max(self._users.crowd, self.clients.pool.taken)
        self._members.add(member)

    def leave(self, member: Member, sock: socket.socket, *, empty: bool, in_flight: int) -> None:
        """Disconnect a client, whose socket is given away; `empty`: there is nothing in it.

        Until the descriptors in flight have been received, or the client has closed its end, its connection counts.
        """
        self._members.remove(member)
        if in_flight:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            self._await_delivery(sock, in_flight)
        else:
            self._end(sock, empty=empty)

    def _await_delivery(self, sock: socket.socket, in_flight: int) -> None:
        if unread(sock):
            self._loop.call_later(_UNDELIVERED_SECONDS, self._await_delivery, sock, in_flight)
        else:
            self.in_flight.take(-in_flight)
            self._end(sock, empty=False)

    def _end(self, sock: socket.socket, *, empty: bool) -> None:
        if empty:
            sock.close()
        else:  # descriptors that were not received are closed with it
            self.dismiss([sock.detach()])
        self.clients.take(-1)
        self._users.shrink_heap()
        self._users.forget_idle(self)

    # -- output and descriptors held -----------------------------------------------------------

    def weigh(self, more: int) -> None:
        """Count unread output: more, or less."""
        self.unread.take(more)
        self._look_at(self.unread)
        self._users.shrink_heap()

    def _hold(self, more: int) -> None:
        """Count descriptors that are being closed."""
        self.closing.take(more)
        self._look_at(self.closing)

    def _look_at(self, share: Share) -> None:
        if not self.full:
            if not share.allows(0):
                self._fill()
        elif all(one.taken <= one.most // 2 for one in (self.unread, self.closing)):
            self._relieve()

    def _fill(self) -> None:
        self.high_water = -1
        for member in self._members:
            member.pause()
        self._loop.call_later(FULL_SECONDS, self._cut_the_silent)

    def _relieve(self) -> None:
        self.high_water = HIGH_WATER
        for member in self._members:
            self._loop.call_soon(member.resume)

    def _cut_the_silent(self) -> None:
        silent = [member for member in self._members if member.silent_for() >= FULL_SECONDS] if self.full else []
        for member in silent[:_A_TURN]:
            member.close()
        if self.full:
            self._loop.call_later(0 if len(silent) > _A_TURN else FULL_SECONDS / 4, self._cut_the_silent)

    # -- descriptors in flight ------------------------------------------------------------------

    def may_pass(self, count: int) -> bool:
        """Whether that many more descriptors may be sent, as far as is known of those that were received."""
        if self.in_flight.allows(count):
            return True
        now = self._loop.time()
        if now - self._recounted >= _RECOUNT_SECONDS:
            self._recounted = now
            for member in self._members:
                member.recount()
        return self.in_flight.allows(count)

    # -- input ----------------------------------------------------------------------------------

    def weigh_half(self, more: int) -> None:
        """Count half messages."""
        self._halves += more
        self.large = LARGE if self._halves <= HALVES else _LITTLE

    # -- closing --------------------------------------------------------------------------------

    def dismiss(self, fds: Iterable[int], closed: Callable[[], None] = lambda: None) -> bool:
        """Close descriptors, which are given away. True: that takes long, and `closed` is called when they are."""
        fds = list(fds)
        if fds and self._closers >= _CLOSERS:
            self._to_close.append((fds, closed))
            self._hold(len(fds))
            return True
        return bool(fds) and self._dismiss(fds, closed)

    def _dismiss(self, fds: list[int], closed: Callable[[], None]) -> bool:
        count, closing = len(fds), close_beside(fds)
        if closing is None:
            return False
        self._closers += 1
        self._hold(count)

        def done(_: asyncio.Future[None]) -> None:
            self._closers -= 1
            self._hold(-count)
            closed()
            self._dismiss_waiting()

        closing.add_done_callback(done)
        return True

    def _dismiss_waiting(self) -> None:
        while self._to_close and self._closers < _CLOSERS:
            fds, closed = self._to_close.popleft()
            self._hold(-len(fds))
            if not self._dismiss(fds, closed):
                closed()
        self._users.forget_idle(self)

    @property
    def idle(self) -> bool:
        """Whether there is nothing of this user."""
        return not (self.clients.taken or self._closers or self._to_close)


class Users:
    """All users that have clients, by account: "uid:UID", or what a policy charges to."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.turns = Turns(loop)
        self.clients = Pool(of_descriptors(2))
        self.unread = Pool(UNREAD_MAX, 2 * HIGH_WATER)
        self.closing = Pool(of_descriptors(8), FDS_MAX)
        self.named = Pool(of_descriptors(4))
        self.crowd = 0  # the most clients, and whether much was unread, since the heap was last shrunk
        self.much = False
        self.in_flight = Pool(of_descriptors(1))  # the kernel's limit for a process without privileges
        self._users: dict[str, User] = {}

    def find(self, account: str, limits: Amounts) -> User:
        """The user, with limits that a policy sets, if it is new: clients, queued, fds-held, fds-in-flight."""
        found = self._users.get(account)
        if found is None:
            found = self._users[account] = User(account, self, limits)
        return found

    def shrink_heap(self) -> None:
        """Give memory back that many clients, or much unread output, have taken, once that is over."""
        self.much |= self.unread.taken >= _MUCH
        few = self.clients.taken <= self.crowd // 16
        if (self.much and not self.unread.taken) or (self.crowd >= _CROWD and few):
            self.much, self.crowd = False, self.clients.taken
            self.loop.call_later(_SHRINK_SECONDS, beside, return_free_memory)

    def forget_idle(self, user: User) -> None:
        """Forget a user without clients."""
        if user.idle:
            self._users.pop(user.account, None)
