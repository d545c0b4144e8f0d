"""The policy: rules that say which rights a client has. The first rule that matches wins.

A rule matches if each key of its `match` holds; what is not known of a client matches nothing. A rule that gives the
role admin matches nobody but root and gmemd's own user, by effective and by real uid: a program that runs set-uid for
somebody else is not root.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final, NamedTuple

from gmemd.authority.peer import Peer
from gmemd.authority.rights import Rights, Role
from gmemd.errors import QmpError


class Rule(NamedTuple):
    """One rule, its names resolved."""

    match: Mapping[str, tuple[Any, ...]]  # uid, gid, group: numbers; http: (True,); the others: words
    rights: Rights  # with neither room nor account
    shared: bool = False  # all that match have one account

    def matches(self, peer: Peer | None) -> bool:
        """Whether it is about a client; None: one that is connected by TCP, and so has no identity."""
        if peer is None:
            return "http" in self.match
        if self.rights.role is Role.ADMIN and not (peer.uid == peer.ruid and peer.uid in (0, os.geteuid())):
            return False
        return all(_HOLDS[key](peer, wanted) for key, wanted in self.match.items())

    def is_of(self, namespace: str) -> bool:
        """Whether it is about the clients of the made rooms of a namespace."""
        return namespace != "" and any(fnmatchcase(namespace, pattern) for pattern in self.match.get("namespace", ()))


@dataclass(frozen=True, slots=True)
class Policy:
    """All rules, in their order."""

    rules: tuple[Rule, ...]
    default: Rule

    def rights_of(self, peer: Peer | None) -> Rights:
        """The rights of a client, None: of one by TCP; QmpError if it is not let in."""
        rule = next((rule for rule in self.rules if rule.matches(peer)), self.default)
        rights = rule.rights
        if rights.role is Role.NONE or (peer is None and rule is self.default):
            raise QmpError("the policy does not let it in" + (f" (rule '{rights.rule}')" if rights.rule else ""))
        if peer is None:
            return rights
        account = f"rule:{rights.rule}" if rule.shared else f"uid:{peer.uid}"
        return rights._replace(account=account, room=str(peer.uid) if rights.role is Role.TENANT else None)

    def rights_in(self, room: str, namespace: str) -> Rights:
        """The rights of the clients of a made room; QmpError if its namespace has none."""
        rule = next((rule for rule in self.rules if rule.is_of(namespace)), None)
        if rule is None or rule.rights.role is Role.NONE:
            raise QmpError(f"the policy lets namespace '{namespace}' have nothing" if namespace else
                           "the policy lets a room without a namespace have nothing")
        return rule.rights._replace(room=room,
                       account=f"rule:{rule.rights.rule}" if rule.shared else f"namespace:{namespace}")


def _below(peer: Peer, wanted: tuple[str, ...]) -> bool:
    return peer.cgroup != "" and any(f"{peer.cgroup}/".startswith(f"{group.rstrip('/')}/") for group in wanted)


def _like(name: str) -> Callable[[Peer, tuple[str, ...]], bool]:
    return lambda peer, wanted: any(getattr(peer, name) and fnmatchcase(getattr(peer, name), pattern)
                                    for pattern in wanted)


_HOLDS: Final[Mapping[str, Callable[[Peer, tuple[Any, ...]], bool]]] = {
    "uid": lambda peer, wanted: peer.uid in wanted,
    "gid": lambda peer, wanted: peer.gid in wanted,
    "group": lambda peer, wanted: not peer.groups.isdisjoint(wanted),
    "unit": _like("unit"),
    "cgroup": _below,
    "selinux": _like("label"),
    "http": lambda peer, wanted: False,  # has an identity
    "namespace": lambda peer, wanted: False,  # is not a client of a made room
}
