"""What to do about a refusal: a line or more below QEMU's sentence.

Names, values and types come from the server's own introspection and from what exists there; a rule here knows
only the form of a sentence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from gmemd.cli.introspection import Introspection
from gmemd.cli.words import parse_integer
from gmemd.errors import QmpError

_MOST = 20  # names listed in a hint


class Refusal:
    """A refused command and the means to find out what would have been right."""

    def __init__(self, error: QmpError, command: str, arguments: dict[str, Any], ask: Callable[..., Any]) -> None:
        """`ask(command, arguments)` runs a command on the same server; it may raise."""
        self.error = error
        self.command = command
        self.arguments = arguments
        self.ask = ask

    def introspection(self) -> Introspection:
        return Introspection(self.ask("query-qmp-schema"))

    def ids(self) -> list[str]:
        """Return the ids of all objects."""
        entries = self.ask("qom-list", {"path": "/objects"})
        return [entry["name"] for entry in entries if entry["type"].startswith("child<")]


def hints(refusal: Refusal) -> list[str]:
    """Return what helps, one line each, [] if nothing is known; never raises for what the server answers."""
    for pattern, rule in _RULES:
        found = pattern.search(refusal.error.desc)
        if found:
            try:
                return [line for line in rule(refusal, *found.groups()) if line]
            except (QmpError, OSError, LookupError, TypeError):
                return []  # the server lacks the command asked for, has gone, or answers in another shape
    return []


def nearest(word: str, names: Iterable[str]) -> str:
    """Return a question after the name most like `word`, "" if none is."""
    import difflib

    names = list(names)
    # 'memfd' for 'memory-backend-memfd': what a name ends with says more than the distance
    tails = sorted((name for name in names if word and name.endswith("-" + word)), key=len)
    similar = tails or difflib.get_close_matches(word.replace("_", "-").lower(), names, n=1)
    return f"did you mean '{similar[0]}'?" if similar else ""


def _listed(intro: str, names: Iterable[str]) -> str:
    names = list(names)
    more = f", and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return f"{intro}: {', '.join(names[:_MOST])}{more}" if names else ""


# -- the rules: (refusal, what the pattern's groups matched) -> lines


def _command_not_found(refusal: Refusal, name: str) -> Iterable[str]:
    known = [entry["name"] for entry in refusal.ask("query-commands")]
    yield nearest(name, known)
    yield "'gmemctl call' lists the commands of this server"


def _missing(refusal: Refusal, name: str) -> Iterable[str]:
    known = refusal.introspection()
    member = known.member(refusal.command, name, refusal.arguments)
    if member:
        yield f"give {name}={_placeholder(known, member.type)}"
    yield _takes(known, refusal)


def _unexpected(refusal: Refusal, name: str) -> Iterable[str]:
    known = refusal.introspection()
    names = [member.name for member in known.members(refusal.command, refusal.arguments)]
    yield nearest(name, (other for other in names if other not in refusal.arguments))
    yield _listed(f"'{name}' belongs to", known.cases_with(refusal.command, name))
    yield _takes(known, refusal)


def _bad_value(refusal: Refusal, name: str, value: str) -> Iterable[str]:
    known = refusal.introspection()
    # the sentence names an element of a list 'null'
    members = [
        member
        for member in known.members(refusal.command, refusal.arguments)
        if known.values(member.type) and (member.name == name or name == "null")
    ]
    for member in members:
        yield nearest(value, known.values(member.type))
        yield _listed(f"'{member.name}' takes one of", known.values(member.type))


def _bad_type(refusal: Refusal, name: str, expected: str) -> Iterable[str]:
    known = refusal.introspection()
    member = known.member(refusal.command, name.partition("[")[0].partition(".")[0], refusal.arguments)
    yield f"'{name}' takes {known.describe(member.type)}" if member else ""
    yield {
        "boolean": "in JSON true or false, without quotes",
        "integer": "in JSON a whole number, without quotes or suffix",
        "string": "in JSON a text in quotes",
    }.get(expected, "")


def _bad_integer(refusal: Refusal, name: str, bits: str) -> Iterable[str]:
    yield f"a whole number from 0 to {(1 << int(bits)) - 1}"
    given = refusal.arguments.get(name)
    number = parse_integer(given) if isinstance(given, str) else None
    if number is not None:
        yield f"in JSON without quotes or suffix: {number}"


def _bad_size(refusal: Refusal) -> Iterable[str]:
    yield "bytes, or a number with a suffix: 65536, 64K, 512M, 1.5G, 2T"


def _object_not_found(refusal: Refusal, name: str) -> Iterable[str]:
    if lost := _lost(refusal, name.removeprefix("/objects/")):
        yield from lost
        return
    ids = refusal.ids()
    yield nearest(name.removeprefix("/objects/"), ids)
    yield _listed("the objects here", ids) or "there are no objects; 'gmemctl create' makes one"


def _lost(refusal: Refusal, name: str) -> list[str]:
    """What to say of an object whose memory did not come back; [] for any other."""
    try:
        lost = refusal.ask("query-memdev-lost")
    except QmpError:  # a server without it
        return []
    for record in lost:
        if record["id"] == name:
            return [f"its memory ({record['qom-type']}, {record['size']} bytes) did not come back with the daemon",
                    f"'gmemctl rm {name}' forgets about it, and frees the id"]
    return []


def _duplicate(refusal: Refusal, name: str) -> Iterable[str]:
    if lost := _lost(refusal, name):
        yield from lost
    elif name in refusal.ids():
        yield f"'gmemctl show {name}' shows the one that exists, 'gmemctl rm {name}' removes it"
    else:
        yield f"'{name}' is taken by the server itself; choose another id"


def _bad_id(refusal: Refusal) -> Iterable[str]:
    yield "a letter, then letters, digits, '-', '.', '_'"


def _property_not_found(refusal: Refusal, qom_type: str, name: str) -> Iterable[str]:
    names = [entry["name"] for entry in refusal.ask("qom-list-properties", {"typename": qom_type})]
    yield nearest(name, names)
    yield _listed(f"{qom_type} has", names)


def _class_not_found(refusal: Refusal, name: str) -> Iterable[str]:
    names = [entry["name"] for entry in refusal.ask("qom-list-types")]
    yield nearest(name, names)
    yield _listed("there are", names)


def _too_small(refusal: Refusal, given: str, wanted: str) -> Iterable[str]:
    if refusal.arguments.get("size") == int(given, 16):
        yield f"size must be a multiple of the page size; the next one is {int(wanted, 16)}"


def _no_memory(refusal: Refusal) -> Iterable[str]:
    if refusal.arguments.get("hugetlb") is True:
        yield "huge pages must be reserved first: see HugePages_Free in /proc/meminfo, vm.nr_hugepages"
    else:
        yield "the host lacks memory for this size, or may not promise it: 'free -h', vm.overcommit_memory"


def _no_guest_memfd(refusal: Refusal) -> Iterable[str]:
    status = refusal.ask("query-kvm")
    yield f"KVM here: present {str(status['present']).lower()}, used {str(status['enabled']).lower()}"
    yield "guest_memfd needs /dev/kvm and Linux 6.18; 'gmemd --kernel simulated' simulates it"


def _no_backing_file(refusal: Refusal) -> Iterable[str]:
    yield "the path is the daemon's: as its user, in its mount namespace, from its working directory"


def _disabled(refusal: Refusal) -> Iterable[str]:
    yield "the daemon runs with --compat unstable-input=reject"


def _no_fd(refusal: Refusal) -> Iterable[str]:
    yield f"send one: gmemctl call --fd 3 {refusal.command} ... 3<FILE"


def _job_not_found(refusal: Refusal) -> Iterable[str]:
    jobs = [job["id"] for job in refusal.ask("query-jobs")]
    yield _listed("the jobs here", jobs) or "there are no jobs"


def _job_state(refusal: Refusal, name: str, state: str) -> Iterable[str]:
    ended = state == "concluded"
    yield f"'gmemctl jobs --dismiss {name}' forgets it" if ended else "'gmemctl jobs -f' waits for its end"


def _job_exists(refusal: Refusal, name: str) -> Iterable[str]:
    yield f"'gmemctl jobs' shows it; once it has ended, 'gmemctl jobs --dismiss {name}' forgets it"


def _no_conversion(refusal: Refusal, name: str) -> Iterable[str]:
    yield "only a guest_memfd has private parts: memory-backend-memfd with guest-memfd=on makes one"


def _busy(refusal: Refusal) -> Iterable[str]:
    yield "'gmemctl jobs -f' shows the progress and waits for the end"


def _leased(refusal: Refusal) -> Iterable[str]:
    yield "that process gives it back by memdev-release, or by ending; see 'gmemctl call query-memdev-leases'"


def _nobody_keeps(refusal: Refusal) -> Iterable[str]:
    yield "'gmemctl survive' says what to change"


def _takes(known: Introspection, refusal: Refusal) -> str:
    members = known.members(refusal.command, refusal.arguments)
    names = [f"[{member.name}]" if member.optional else member.name for member in members]
    return _listed(f"{refusal.command} takes", names) or f"{refusal.command} takes no arguments"


def _placeholder(known: Introspection, type_name: str) -> str:
    return {"int": "NUMBER", "str": "TEXT", "bool": "on|off"}.get(type_name) or known.describe(type_name)


_RULES: list[tuple[re.Pattern[str], Callable[..., Iterable[str]]]] = [
    (re.compile(pattern), rule)
    for pattern, rule in (
        (r"^The command (.*) has not been found$", _command_not_found),
        (r"^Parameter '(.*)' is missing$", _missing),
        (r"^Parameter '(.*)' is unexpected$", _unexpected),
        (r"^Invalid parameter '(.*)'$", _unexpected),
        (r"^Parameter '.*' expects a size value$", _bad_size),
        (r"^Parameter '(.*)' does not accept value '(.*)'$", _bad_value),
        (r"^Invalid parameter type for '(.*)', expected: (\w+)$", _bad_type),
        (r"^Parameter '(.*)' expects uint(\d+)(?:_t)?$", _bad_integer),
        (r"^Parameter 'id' expects an identifier$", _bad_id),
        (r"^object '(.*)' is lost\b", _lost),
        (r"^object '(.*)' not found$", _object_not_found),
        (r"^Device '(.*)' not found$", _object_not_found),
        (r"^attempt to add duplicate property '(.*)' to object \(type 'container'\)$", _duplicate),
        (r"^Property '(.*)\.(.*)' not found$", _property_not_found),
        (r"^Class '(.*)' not found$", _class_not_found),
        (r"backing store size (0x\w+) is too small for 'size' option (0x\w+) ", _too_small),
        (r"^KVM does not support guest_memfd$|^guest-memfd requires KVM accelerator$", _no_guest_memfd),
        (r"^can't open backing store ", _no_backing_file),
        (r"^Job not found$", _job_not_found),
        (r"^Job '(.*)' in state '(.*)' cannot accept", _job_state),
        (r"^Job ID '(.*)' already in use$", _job_exists),
        (r"^Invalid job ID ", _bad_id),
        (r"^object '(.*)' is no guest_memfd$", _no_conversion),
        (r"^object '.*' is busy: ", _busy),
        (r"^object '.*' is leased to process ", _leased),
        (r"^nobody keeps objects here", _nobody_keeps),
        (r"^Unstable (?:parameter|command) .* disabled by policy$", _disabled),
        (r"^No file descriptor supplied via SCM_RIGHTS$", _no_fd),
        (r": Cannot allocate memory$|: No space left on device$", _no_memory),
    )
]
