"""What to do about a refusal: one or more lines below the server's message.

Names, values and types come from the server's own introspection and from what exists there; a rule here knows only the
form of a message. Hints for refusals of a single verb are declared with that verb.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from gmemd.cli.call_syntax import parse_integer
from gmemd.cli.introspection import Introspection
from gmemd.errors import QmpError

_MOST = 20  # names of the server's own that a hint lists
_FEW = 5  # names given by its users: there may be any number

Rule = Callable[..., Iterable[str]]  # (refusal, what the pattern's groups matched) -> lines
Hint = tuple[str, str | Rule]  # a pattern of the message; a line with the groups as {}, {command}; or a rule


class Refusal(NamedTuple):
    """A refused command, and the means to find out what would have been right."""

    error: QmpError
    command: str
    arguments: dict[str, Any]
    ask: Callable[..., Any]  # ask(command, arguments) runs a command on the same server; it may raise

    def introspection(self) -> Introspection:
        return Introspection(self.ask("query-qmp-schema"))

    def ids(self) -> list[str]:
        """Return the ids of all objects, sorted."""
        entries = self.ask("qom-list", {"path": "/objects"})
        return sorted(entry["name"] for entry in entries if entry["type"].startswith("child<"))


def hints(refusal: Refusal, of_verbs: Iterable[Hint] = ()) -> list[str]:
    """Return hints, one line each, [] if there are none; never raises for what the server answers."""
    for pattern, rule in (*of_verbs, *HINTS):
        found = re.search(pattern, refusal.error.desc)
        if not found:
            continue
        if isinstance(rule, str):
            return [rule.format(*found.groups(), command=refusal.command)]
        try:
            return [line for line in rule(refusal, *found.groups()) if line]
        except (QmpError, OSError, LookupError, TypeError):
            break  # the server lacks the command, has gone, or answers in another form
    return []


def nearest(word: str, names: Iterable[str]) -> str:
    """Return a question with the name most similar to `word`, "" if none is."""
    import difflib

    names = list(names)
    # 'memfd' for 'memory-backend-memfd': the end of a name says more than the distance
    tails = sorted((name for name in names if word and name.endswith("-" + word)), key=len)
    similar = tails or difflib.get_close_matches(word.replace("_", "-").lower(), names, n=1)
    return f"did you mean '{similar[0]}'?" if similar else ""


def few(names: Iterable[str], most: int = _FEW) -> str:
    """Return names for a sentence: a few of them, and the number of the rest."""
    names = list(names)
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def listed(intro: str, names: Iterable[str], most: int = _FEW) -> str:
    """Return a sentence with a few of the names, "" if there are none."""
    return f"{intro}: {few(names, most)}" if (names := list(names)) else ""


# -- the rules for refusals of any command


def _command_not_found(refusal: Refusal, name: str) -> Iterable[str]:
    yield nearest(name, [entry["name"] for entry in refusal.ask("query-commands")])
    yield "'gmemctl call' lists the commands of this server"


def _missing(refusal: Refusal, name: str) -> Iterable[str]:
    known = refusal.introspection()
    member = known.member(refusal.command, name, refusal.arguments)
    if member:
        value = {"int": "NUMBER", "str": "TEXT", "bool": "on|off"}.get(member.type) or known.describe(member.type)
        yield f"give {name}={value}"
    yield _takes(known, refusal)


def _unexpected(refusal: Refusal, name: str) -> Iterable[str]:
    known = refusal.introspection()
    names = [member.name for member in known.members(refusal.command, refusal.arguments)]
    yield nearest(name, (other for other in names if other not in refusal.arguments))
    yield listed(f"'{name}' belongs to", known.cases_with(refusal.command, name), _MOST)
    yield _takes(known, refusal)


def _bad_value(refusal: Refusal, name: str, value: str) -> Iterable[str]:
    known = refusal.introspection()
    # the message calls an element of a list 'null'
    for member in known.members(refusal.command, refusal.arguments):
        values = known.values(member.type)
        if values and name in (member.name, "null"):
            yield nearest(value, values)
            yield listed(f"'{member.name}' takes one of", values, _MOST)


def _bad_type(refusal: Refusal, name: str, expected: str) -> Iterable[str]:
    known = refusal.introspection()
    member = known.member(refusal.command, name.partition("[")[0].partition(".")[0], refusal.arguments)
    yield f"'{name}' takes {known.describe(member.type)}" if member else ""
    yield {
        "boolean": "in JSON true or false, without quotes",
        "integer": "in JSON a whole number, without quotes or suffix",
        "string": "in JSON a string in quotes",
    }.get(expected, "")


def _bad_integer(refusal: Refusal, name: str, bits: str) -> Iterable[str]:
    yield f"a whole number from 0 to {(1 << int(bits)) - 1}"
    given = refusal.arguments.get(name)
    number = parse_integer(given) if isinstance(given, str) else None
    if number is not None:
        yield f"in JSON without quotes or suffix: {number}"


def _object_not_found(refusal: Refusal, name: str) -> Iterable[str]:
    name = name.removeprefix("/objects/")
    if lost := _lost(refusal, name) or _gone(refusal, name):
        yield from lost
        return
    ids = refusal.ids()
    if name in ids:
        yield f"'{name}' is not memory"
        return
    longer = [other for other in ids if name and other.startswith(name)]
    if len(longer) > 1:
        yield f"did you mean {few(longer)}? '{name}*' means all of them"
        return
    yield nearest(name, ids)
    yield from _no_match(refusal)


def _no_match(refusal: Refusal) -> Iterable[str]:
    yield listed("the objects here", refusal.ids()) or "there are no objects; 'gmemctl create' creates one"


def _lost(refusal: Refusal, name: str) -> list[str]:
    """Hints for an object whose memory did not come back; [] for any other."""
    try:
        lost = refusal.ask("query-memdev-lost")
    except QmpError:  # a server without this command
        return []
    for record in lost:
        if record["id"] == name:
            return [f"its memory ({record['qom-type']}, {record['size']} bytes) did not come back with the daemon",
                    f"'gmemctl rm {name}' removes it and frees the id"]
    return []


def _gone(refusal: Refusal, name: str) -> list[str]:
    """Hints for an object that was moved to another gmemd; [] for any other."""
    try:
        moves = refusal.ask("query-memdev-moves", {"id": name})
    except QmpError:  # a server without this command
        return []
    return [f"it was moved to {move['peer']}; 'gmemctl rm {name}' forgets that and frees the id" for move in moves
            if move["state"] == "gone"]


def _duplicate(refusal: Refusal, name: str) -> Iterable[str]:
    if lost := _lost(refusal, name):
        yield from lost
    elif name in refusal.ids():
        yield f"'gmemctl show {name}' shows the one that exists, 'gmemctl rm {name}' removes it"
    else:
        yield f"'{name}' is taken by the server itself; choose another id"


def _property_not_found(refusal: Refusal, qom_type: str, name: str) -> Iterable[str]:
    names = [entry["name"] for entry in refusal.ask("qom-list-properties", {"typename": qom_type})]
    yield nearest(name, names)
    yield listed(f"{qom_type} has", names, _MOST)


def _class_not_found(refusal: Refusal, name: str) -> Iterable[str]:
    names = [entry["name"] for entry in refusal.ask("qom-list-types")]
    yield nearest(name, names)
    yield listed("there are", names, _MOST)


def _too_small(refusal: Refusal, given: str, wanted: str) -> Iterable[str]:
    if refusal.arguments.get("size") == int(given, 16):
        yield f"size must be a multiple of the page size; the next one is {int(wanted, 16)}"


def _no_memory(refusal: Refusal) -> Iterable[str]:
    if refusal.arguments.get("hugetlb") is True:
        yield "huge pages must be reserved first: see HugePages_Free in /proc/meminfo, vm.nr_hugepages"
    else:
        yield "the host lacks memory for this size, or may not overcommit it: 'free -h', vm.overcommit_memory"


def _no_guest_memfd(refusal: Refusal) -> Iterable[str]:
    status = refusal.ask("query-kvm")
    yield f"KVM here: present {str(status['present']).lower()}, used {str(status['enabled']).lower()}"
    yield "guest_memfd needs /dev/kvm and Linux 6.18; 'gmemd --kernel simulated' simulates it"


def _takes(known: Introspection, refusal: Refusal) -> str:
    members = known.members(refusal.command, refusal.arguments)
    names = [f"[{member.name}]" if member.optional else member.name for member in members]
    return listed(f"{refusal.command} takes", names, _MOST) or f"{refusal.command} takes no arguments"


_AN_ID = "a letter, then letters, digits, '-', '.', '_'"

HINTS: tuple[Hint, ...] = (
    (r"^The command (.*) has not been found$", _command_not_found),
    (r"^Parameter '(.*)' is missing$", _missing),
    (r"^Parameter '(.*)' is unexpected$", _unexpected),
    (r"^Invalid parameter '(.*)'$", _unexpected),
    (r"^Parameter '.*' expects a size value$", "bytes, or a number with a suffix: 65536, 64K, 512M, 1.5G, 2T"),
    (r"^Parameter '(.*)' does not accept value '(.*)'$", _bad_value),
    (r"^Invalid parameter type for '(.*)', expected: (\w+)$", _bad_type),
    (r"^Parameter '(.*)' expects uint(\d+)(?:_t)?$", _bad_integer),
    (r"^Parameter 'id' expects an identifier$", f"{_AN_ID}; or ID@ROOM, if 'gmemctl room ls' lists that room"),
    (r"^Invalid job ID ", _AN_ID),
    (r"^object '(.*)' is lost\b", _lost),
    (r"^(?:object|Device) '(.*)' not found$", _object_not_found),
    (r"^no object matches ", _no_match),
    (r"^attempt to add duplicate property '(.*)' to object \(type 'container'\)$", _duplicate),
    (r"^Property '(.*)\.(.*)' not found$", _property_not_found),
    (r"^Class '(.*)' not found$", _class_not_found),
    (r"backing store size (0x\w+) is too small for 'size' option (0x\w+) ", _too_small),
    (r"^KVM does not support guest_memfd$|^guest-memfd requires KVM accelerator$", _no_guest_memfd),
    (r"^Unstable (?:parameter|command) .* disabled by policy$", "the daemon runs with --compat unstable-input=reject"),
    (r" disabled by policy$", "'gmemctl can' says what you may"),
    (r": Cannot allocate memory$|: No space left on device$", _no_memory),
)
