"""What is measured: one `Row` for each measure of the target table, in its order."""

from __future__ import annotations

from dataclasses import dataclass

import guests
import snapshots
import stalls
from measure import (
    Measure,
    asking,
    connecting,
    crowded,
    disturbed_ping,
    idle_memory,
    memory_per_client,
    memory_per_object,
    preallocating,
    raw_allocation,
    scraped_ping,
    starting,
)
from ranges import converting, creating, filling, growth, listing
from stalls import worst_ping

BASE = "89ca488"
# How many times as good as that commit a row is to be, in pure Python and compiled.
GAINS = {
    "ping": (1.2, 1.5), "pipe64": (1.15, 2.0), "pairs": (1.2, 1.4), "pairs64": (1.2, 1.6), "durable": (1.4, 1.8),
    "durable64": (1.25, 1.4), "wrong": (1.15, 1.25), "badjson": (1.15, 1.25), "ls10000": (4.0, 4.0),
    "tib-ranges": (1.5, 1.5), "page": (2.0, 2.0), "start": (1.15, 1.15), "rss": (1.3, 1.3),
}

PING = '{"execute":"query-version"}'
MEMDEV = '{"execute":"query-memdev"}'
STATUS = '{"execute":"query-memdev-status"}'
LIST_GET = '{"execute":"qom-list-get","arguments":{"paths":[]}}'
RANGES = '{"execute":"query-memdev-ranges","arguments":{"id":"big"}}'
DEL = '{"execute":"object-del","arguments":{"id":"m@"}}'


def _add(properties: str) -> str:
    return '{"execute":"object-add","arguments":{"qom-type":"memory-backend-memfd",' + properties + "}}"


ADD = _add('"id":"m@","size":67108864,"share":true')
GUEST_ADD = _add('"id":"m@","size":67108864,"share":true,"guest-memfd":"on"')
FILL = _add('"id":"f@","size":67108864,"share":true')
UNKNOWN = _add('"id":"m","size":67108864,"colour":1')
WRONG = _add('"id":"m","size":"x"')


@dataclass(frozen=True)
class Target:
    """A row's first subject is to be at least `factor` times as good as `subject`, or at most `limit`."""

    subject: str = ""
    factor: float = 0
    limit: float = 0


@dataclass(frozen=True)
class Row:
    """One measure: its subjects, how they are measured, and the targets. The first subject is the one in question."""

    name: str
    title: str
    unit: str
    subjects: dict[str, tuple[str, Measure]]  # label: server's name and how it is measured
    targets: tuple[Target, ...] = ()
    more_is_better: bool = False
    slow: bool = False  # left out of a quick run


def _same(measure: Measure, *servers: str) -> dict[str, tuple[str, Measure]]:
    return {server: (server, measure) for server in servers}


def _pairs(add: str = ADD, depth: int = 0, *, each: bool = False) -> Measure:
    return asking([add, DEL], key="rate", divisor=2, rounds=500 if depth else 10000, depth=depth, each=each)


def _refused_del(name: str) -> Measure:
    return asking([DEL.replace("m@", name)], rounds=20000, refused=True)


def _at(live: int) -> Measure:
    """An object-add and -del while `live` objects are there."""
    return asking([ADD, DEL], rounds=3000, fill=live, fill_line=FILL)


def _pipelined(depth: int) -> Measure:
    return asking([PING], depth=depth, rounds=100000 // depth, key="rate")


def _scraped(path: str = "") -> Measure:
    return scraped_ping(path, fill=10000, fill_line=FILL)


def _worst(prepare: stalls.Prepare) -> dict[str, tuple[str, Measure]]:
    return _same(worst_ping(prepare), "gmemd")


def _guest(**measures: Measure) -> dict[str, tuple[str, Measure]]:
    return {label.replace("_", " "): ("gmemd-guest", measure) for label, measure in measures.items()}


def _alone(**measures: Measure) -> dict[str, tuple[str, Measure]]:
    return {label: ("", measure) for label, measure in measures.items()}


_NO_STALL = (Target(limit=10),)
_listed = asking([MEMDEV], rounds=300, fill=1000, fill_line=FILL)

ROWS = (
    Row("ping", "ping (query-version), one client, one core for both, p50", "µs",
        _same(asking([PING], rounds=20000, same_core=True), "gmemd", "qemu", "qsd", "echo", "asyncio"),
        (Target("qemu", 6), Target("echo", 1 / 2.3))),
    Row("pipe64", "pings, 64 pipelined", "/s", _same(_pipelined(64), "gmemd", "qemu", "qsd", "echo"),
        (Target("qemu", 15),), more_is_better=True),
    Row("pipe512", "pings, 512 pipelined", "/s", _same(_pipelined(512), "gmemd", "qemu", "qsd", "echo"),
        (Target("qemu", 15),), more_is_better=True),
    Row("pairs", "object-add and -del of a 64 MiB memfd, waiting each, --persist off", "pairs/s",
        _same(_pairs(), "gmemd", "qemu"), (Target("qemu", 12),), more_is_better=True),
    Row("pairs64", "the same, 64 pairs pipelined", "pairs/s",
        _same(_pairs(depth=64), "gmemd", "qemu"), (Target("qemu", 25),), more_is_better=True),
    Row("durable", "the same, durable, waiting each", "pairs/s",
        _same(_pairs(), "gmemd-durable", "qemu"), (Target("qemu", 4),), more_is_better=True),
    Row("durable64", "the same, durable, 64 of them in one write, then 64 deletions in one", "pairs/s",
        _same(_pairs(depth=64, each=True), "gmemd-durable", "qemu"), (Target("qemu", 10),), more_is_better=True),
    Row("guest", "the same with guest-memfd=on (real KVM), waiting each", "pairs/s",
        {"gmemd": ("gmemd", _pairs(GUEST_ADD)), "plain memfd": ("gmemd", _pairs())},
        (Target("plain memfd", 0.8),), more_is_better=True),
    Row("guest64", "the same with guest-memfd=on (real KVM), 64 pairs pipelined", "pairs/s",
        {"gmemd": ("gmemd", _pairs(GUEST_ADD, depth=64)), "plain memfd": ("gmemd", _pairs(depth=64))},
        (Target("plain memfd", 0.8),), more_is_better=True),
    Row("live", "object-add and -del with 10,000 objects live, p50", "µs",
        {"gmemd at 10,000": ("gmemd", _at(10000)), "gmemd at 10": ("gmemd", _at(10)),
         "qemu at 10": ("qemu", _at(10)), "qemu at 1,000": ("qemu", _at(1000))},
        (Target("gmemd at 10", 1 / 1.2),)),
    Row("memdev", "query-memdev with 1,000 objects, p50", "µs", _same(_listed, "gmemd", "qemu"),
        (Target("qemu", 10),)),
    Row("schema", "query-qmp-schema, p50", "µs",
        _same(asking(['{"execute":"query-qmp-schema"}'], rounds=500), "gmemd", "qemu", "qsd"),
        (Target("qemu", 100),)),
    Row("unknown", "refused object-add: unknown property, p50", "µs",
        _same(asking([UNKNOWN], rounds=5000, refused=True), "gmemd", "qemu"), (Target("qemu", 6),)),
    Row("wrong", "refused object-add: wrong type, p50", "µs",
        _same(asking([WRONG], rounds=5000, refused=True), "gmemd", "qemu"), (Target("qemu", 6),)),
    Row("foreign", "refused object-del by a tenant: of what others have, and of what does not exist, p50", "µs",
        {"foreign": ("gmemd-tenant", _refused_del("foreign")), "absent": ("gmemd-tenant", _refused_del("missing"))},
        (Target("absent", 1 / 1.03),)),
    Row("badjson", "malformed JSON, one at a time, p50", "µs",
        _same(asking(['{"execute": "query-version", }'], rounds=5000, refused=True), "gmemd", "qemu", "qsd"),
        (Target("qemu", 2.5),)),
    Row("connect", "connect, negotiate, close, p50", "µs",
        _same(connecting(rounds=1000), "gmemd", "qemu", "qsd", "echo"), (Target("qemu", 1.5),)),
    Row("crowd", "pings of 64 clients at a time, each waiting for its reply", "/s",
        {"gmemd": ("gmemd", crowded(64)), "one client": ("gmemd", crowded(1))}, (Target("one client", 1),),
        more_is_better=True),
    Row("crowd-share", "the same, what the slowest of the 64 gets by what the fastest gets", "",
        {"gmemd": ("gmemd", crowded(64, share=True))}),
    Row("p99-prealloc", "p99 of a ping while another client preallocates 4 GiB", "µs",
        {"gmemd": ("gmemd", disturbed_ping(preallocates=True)), "gmemd idle": ("gmemd", disturbed_ping()),
         "qemu": ("qemu", disturbed_ping(preallocates=True)), "qemu idle": ("qemu", disturbed_ping())},
        (Target("gmemd idle", 1 / 3),), slow=True),
    Row("p99-flood", "p99 of a ping while another client floods", "µs",
        {"gmemd": ("gmemd", disturbed_ping(floods=True)), "gmemd idle": ("gmemd", disturbed_ping())},
        (Target("gmemd idle", 1 / 3),)),
    Row("p99-both", "p99 of a ping while one client preallocates 4 GiB and another floods", "µs",
        {"gmemd": ("gmemd", disturbed_ping(preallocates=True, floods=True)),
         "gmemd idle": ("gmemd", disturbed_ping())},
        (Target("gmemd idle", 1 / 3),), slow=True),
    Row("p99-scrape", "p99 of a ping, 10,000 objects, beside 100 scrapes of /metrics (or views of the page) a second",
        "µs", {"gmemd": ("gmemd-http", _scraped("/metrics")), "page": ("gmemd-http", _scraped("/")),
               "alone": ("gmemd-http", _scraped())},
        (Target(limit=1000),)),  # below what anybody notices
    Row("p99-loading", "p99 of a ping in the first half second, while gmemd loads ahead", "µs",
        _same(stalls.while_loading("p99", divisor=1), "gmemd", "gmemd-cold")),
    Row("stall-loading", "worst ping in the first half second, while gmemd loads ahead", "ms",
        _same(stalls.while_loading("max", divisor=1e3), "gmemd", "gmemd-cold"), (Target(limit=5),)),
    Row("stall-idle", "worst ping of a client beside nothing", "ms", _worst(stalls.nothing)),
    Row("stall-del", "worst ping of a client during the deletion of 4 GiB by another", "ms", _worst(stalls.deleting),
        _NO_STALL),
    Row("stall-closefd", "the same during closefd of 4 GiB", "ms", _worst(stalls.closing), _NO_STALL),
    Row("stall-refusal", "the same during the first refusal", "ms", _worst(stalls.refusing(WRONG)), _NO_STALL),
    Row("stall-listget", "the same during qom-list-get of 10,000 objects", "ms",
        _worst(stalls.filled(10000, FILL, LIST_GET, '"/objects/f@"')), _NO_STALL),
    Row("stall-status", "the same during query-memdev-status of 10,000 objects", "ms",
        _worst(stalls.filled(10000, FILL, STATUS)), _NO_STALL),
    Row("stall-memdev", "the same during query-memdev of 10,000 objects", "ms",
        _worst(stalls.filled(10000, FILL, MEMDEV)), _NO_STALL),
    Row("stall-ranges", "the same during query-memdev-ranges of 20,000 ranges", "ms",
        _worst(filling(RANGES)), _NO_STALL),
    Row("first-add", "the first object-add", "ms",
        {"gmemd": ("gmemd", stalls.first(ADD, warm=True)),
         "gmemd just started": ("gmemd", stalls.first(ADD, warm=False)),
         "qemu": ("qemu", stalls.first(ADD, warm=True))}, (Target(limit=1),)),
    Row("first-refusal", "the first refusal", "ms",
        {"gmemd": ("gmemd", stalls.first(WRONG, warm=True)),
         "gmemd just started": ("gmemd", stalls.first(WRONG, warm=False)),
         "qemu": ("qemu", stalls.first(WRONG, warm=True))}, (Target(limit=10),)),
    Row("ls1", "gmemctl ls of one object: the server's CPU time", "ms", _same(stalls.listing(1, FILL, "ls"), "gmemd")),
    Row("ls10000", "the same of 10,000 objects", "ms", _same(stalls.listing(10000, FILL, "ls"), "gmemd")),
    Row("page", "status page with 10,000 objects, first view", "ms",
        _same(stalls.viewing(10000, FILL), "gmemd-http")),
    Row("start", "process start to greeting", "ms", _same(starting(), "gmemd", "qemu", "qsd"),
        (Target(limit=100),)),
    Row("rss", "idle RSS, HTTP off, nothing loaded ahead", "MiB",
        {"gmemd": ("gmemd-cold", idle_memory()), "gmemd warm": ("gmemd", idle_memory()),
         **_same(idle_memory(), "qemu", "qsd")},
        (Target("qemu", 1),)),
    Row("rss-http", "idle RSS, HTTP on", "MiB", _same(idle_memory(), "gmemd-http", "qemu"),
        (Target("qemu", 1 / 1.5),)),
    Row("prealloc", "prealloc of a 4 GiB memfd, 2 threads", "GiB/s",
        {**_same(preallocating("memory-backend-memfd", {"share": True}, threads=2), "gmemd", "qemu"),
         "raw fallocate": ("", raw_allocation("memfd", threads=2))},
        (Target("raw fallocate", 0.95),), more_is_better=True, slow=True),
    Row("prealloc-guest", "prealloc of a 4 GiB guest_memfd, 2 threads", "GiB/s",
        {"gmemd": ("gmemd", preallocating("memory-backend-memfd", {"guest-memfd": "on"}, threads=2)),
         "raw fallocate": ("", raw_allocation("guest-memfd", threads=2))},
        (Target("raw fallocate", 0.95),), more_is_better=True, slow=True),
    Row("object-memory", "memory per object (10,000 objects)", "KiB",
        _same(memory_per_object(FILL, [ADD, DEL], count=10000), "gmemd"), (Target(limit=4),)),
    Row("client-memory", "memory per idle client (1,000 clients)", "KiB",
        _same(memory_per_client(count=1000), "gmemd"), (Target(limit=32),)),
    Row("tib-add", "object-add of a sparse guest_memfd of 1 TiB", "ms", _same(creating(), "gmemd", "gmemd-durable"),
        (Target(limit=10),)),
    Row("tib-convert", "memdev-convert of a page of it, after 10,000 scattered ones, p50", "ms",
        _same(converting(), "gmemd", "gmemd-durable"), (Target(limit=10),)),
    Row("tib-ranges", "query-memdev-ranges of all 20,000 ranges; of a hundredth of it", "ms",
        {"gmemd": ("gmemd", listing()), "a hundredth": ("gmemd", listing(0.01))}, (Target(limit=100),)),
    Row("tib-memory", "growth of the daemon by 10,000 scattered conversions of 1 TiB", "MiB",
        _same(growth(), "gmemd", "gmemd-durable"), (Target(limit=10),)),
    Row("replace", "replacing the QEMU of a Linux guest with 1 GiB populated, from stop to running", "ms",
        _guest(gmemd=guests.replacing(), precopy=guests.migrating(pause=False),
               precopys_pause=guests.migrating(pause=True), stop_and_cont=guests.stopping()),
        (Target("precopy", 10),), slow=True),
    Row("checkpoint", "pause of that guest for a checkpoint over the previous copy", "ms",
        _guest(gmemd=guests.checkpointing(), live=guests.checkpointing("--live"), migrate=guests.saving_stopped()),
        (Target("migrate", 3),), slow=True),
    Row("fork", "ten guests that go on from a checkpoint of it, against ten loads of a full save", "s",
        _guest(gmemd=guests.forking(), loads=guests.loading()), (Target("loads", 5),), slow=True),
    Row("fork-memory", "what those ten occupy", "MiB",
        _guest(gmemd=guests.forking(memory=True), loads=guests.loading(memory=True)), (Target("loads", 5),), slow=True),
    Row("save-cpu", "snapshot of 1 GiB populated in 4 GiB, with digests and fsync, against QEMU's migration: CPU", "s",
        _alone(gmemd=snapshots.saving("cpu"), qemu=snapshots.saving_by_qemu("cpu")), (Target("qemu", 2),), slow=True),
    Row("save", "the same: time", "s",
        _alone(gmemd=snapshots.saving("wall"), qemu=snapshots.saving_by_qemu("wall")), (Target("qemu", 1.5),),
        slow=True),
    Row("save-memory", "the same: memory that it adds", "MiB",
        _alone(gmemd=snapshots.saving("memory"), qemu=snapshots.saving_by_qemu("memory")), (Target(limit=64),),
        slow=True),
    Row("increment", "increment after 64 pages of it have changed, known by tracking", "s",
        _alone(gmemd=snapshots.increment(tracked=True), full=snapshots.saving("wall")), (Target("full", 10),),
        slow=True),
    Row("increment-hash", "the same, found by hash", "s",
        _alone(gmemd=snapshots.increment(tracked=False), full=snapshots.saving("wall")), (Target("full", 3),),
        slow=True),
    Row("restore", "restore of it, verified, against QEMU's -incoming", "s",
        _alone(gmemd=snapshots.restoring(), qemu=snapshots.loading_by_qemu()), (Target("qemu", 1.5),), slow=True),
    Row("find", "finding 262,144 scattered pages of a guest_memfd (real KVM)", "ms",
        _alone(gmemd=snapshots.finding(), bisection=snapshots.finding(bisecting=True)), (Target("bisection", 50),),
        slow=True),
    Row("clone", "a clone of a template with 1 GiB in it, ready for a VMM", "ms",
        {"gmemd": ("gmemd", snapshots.cloning(copy=False)), "copy": ("gmemd", snapshots.cloning(copy=True))},
        (Target("copy", 100),), slow=True),
)
