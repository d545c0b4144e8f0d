"""The metrics, generated from the core's counts and the snapshots at a scrape; docs/metrics.md lists them.

At most 300 series whatever exists: objects are summed up by type, and only the first COMMANDS_NAMED commands that are
used get their own series. Series for each object are written only on request, by `per_object`, in portions.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from itertools import accumulate
from typing import Any, Final

from prometheus_client import CONTENT_TYPE_LATEST, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.registry import Collector

from gmemd.changes.pace import Pace
from gmemd.commands.measure import Sweep
from gmemd.observe.counters import BOUNDS, OTHER, Tally
from gmemd.web.host import Host
from gmemd.web.process import process_metrics
from gmemd.web.state import State

CONTENT_TYPE: Final = CONTENT_TYPE_LATEST
COMMANDS_NAMED: Final = 60
WAIT: Final = 1.0  # seconds that a scrape waits for a sweep
_QUOTAS: Final = 16  # things that are limited, with their own series
_PORTION: Final = 50  # objects written at a time

_SIZE = ("gmemd_object_size_bytes", "Size of the memory objects, by type.")
_RESIDENT = ("gmemd_object_resident_bytes", "Memory that the objects occupy now, by visibility.")


class Scraper:
    """Generates the text of a scrape."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._named: list[str] = []  # commands with their own series
        self._texts: dict[str, tuple[Any, bytes]] = {}  # samples and text of a family when it was last generated

    async def text(self, *, objects: bool) -> AsyncIterator[bytes]:
        """The exposition in portions, with a series for each object if requested."""
        sweep = await self._state.measurer.sweep(WAIT)
        host = await self._state.host.read()
        pace, portions, before = Pace(), [], ""
        for family in self._families(sweep, host, summed=not objects):
            portions.append(self._text_of(family, headed=family.name != before))
            before = family.name
            await pace.keep()
        yield b"".join(portions)
        if objects:
            async for portion in self._per_object():
                yield portion

    def _text_of(self, family: Metric, *, headed: bool) -> bytes:
        """The text of a family, or of a part of it that is not `headed`; generated again only when it has changed."""
        key = family.name + str(family.samples[0].labels if family.samples else "")
        known = self._texts.get(key)
        if known is None or known[0] != family.samples:
            known = self._texts[key] = (family.samples, generate_latest(_Families([family])))
        return known[1] if headed else known[1].split(b"\n", 2)[2]

    def _families(self, sweep: Sweep | None, host: Host, *, summed: bool) -> Iterator[Metric]:
        """All families; the parts of one are consecutive."""
        yield from self._daemon()
        yield from self._objects(sweep, summed=summed)
        yield from _host(host)
        yield from self._qmp()
        yield from self._work()
        yield from self._snapshots()
        yield from self._custody()
        yield from self._quotas()
        yield from process_metrics()

    def _daemon(self) -> Iterator[Metric]:
        gmemd = self._state.gmemd
        yield InfoMetricFamily("gmemd_build", "The daemon: its version, its QMP dialect, what provides guest_memfd.", {
            "version": str(gmemd.version["package"]).removeprefix("gmemd "), "kernel": gmemd.kernel.name,
            "qmp": "{major}.{minor}.{micro}".format(**gmemd.version["qemu"])})
        yield GaugeMetricFamily("gmemd_ready", "1 if the daemon is fully working, as /readyz says.",
                                float(not self._state.why_not_ready()))
        yield GaugeMetricFamily("gmemd_event_loop_lag_seconds",
                                "The longest delay of the event loop within the last minute.", self._state.lag.longest)

    def _objects(self, sweep: Sweep | None, *, summed: bool) -> Iterator[Metric]:
        sums = self._state.gmemd.sums()
        yield _by("qom_type", GaugeMetricFamily, "gmemd_objects", "Number of memory objects.",
                  {name: number for name, (number, _) in sums.items()})
        if summed:
            yield _by("qom_type", GaugeMetricFamily, *_SIZE, {name: size for name, (_, size) in sums.items()})
        if summed and sweep is not None:
            yield _by("visibility", GaugeMetricFamily, *_RESIDENT, sweep.usage.by_visibility)
        if sweep is not None:
            yield GaugeMetricFamily("gmemd_objects_unmeasured", "Objects whose residency is unknown.",
                                    sweep.usage.unknown)
            yield GaugeMetricFamily("gmemd_measurement_duration_seconds", "How long measuring all objects took.",
                                    sweep.seconds)

    def _qmp(self) -> Iterator[Metric]:
        counters = self._state.gmemd.counters
        for name, (succeeded, failed) in self._tallies().items():
            commands = CounterMetricFamily("gmemd_qmp_commands", "Answered commands.", labels=["command", "result"])
            commands.add_metric([name, "ok"], succeeded)
            commands.add_metric([name, "error"], failed)
            yield commands
        durations = HistogramMetricFamily(
            "gmemd_qmp_command_duration_seconds",
            "From the start of a command to its reply: those that only read, and those that change something"
            " (until that is durable).", labels=["kind"])
        for kind, found in (("query", counters.queries), ("change", counters.changes)):
            bounds = [*(str(bound) for bound in BOUNDS), "+Inf"]
            durations.add_metric([kind], list(zip(bounds, accumulate(found.counts), strict=True)), found.seconds)
        yield durations
        yield GaugeMetricFamily("gmemd_qmp_connections", "Connected QMP clients.", self._state.connections())
        yield CounterMetricFamily("gmemd_qmp_connections_accepted", "QMP connections accepted since start.",
                                  counters.connections)
        events = {**dict.fromkeys(self._state.gmemd.schema.events[:20], 0), **counters.events}
        yield _by("event", CounterMetricFamily, "gmemd_qmp_events", "Events emitted, by name.", events)

    def _tallies(self) -> dict[str, tuple[int, int]]:
        """Successes and failures by command; commands without their own series count as OTHER."""
        tallies: dict[str, Tally] = self._state.gmemd.counters.commands
        room = COMMANDS_NAMED - len(self._named)
        if room > 0:
            by_use = sorted(tallies, key=lambda name: not (tallies[name].succeeded or tallies[name].failed))
            used = [name for name in by_use if name != OTHER and name not in self._named
                    and (len(tallies) <= COMMANDS_NAMED or tallies[name].succeeded or tallies[name].failed)]
            self._named += used[:room]
        named = {name: (tallies[name].succeeded, tallies[name].failed) for name in self._named}
        rest = [tally for name, tally in tallies.items() if name not in named]
        named[OTHER] = (sum([tally.succeeded for tally in rest]), sum([tally.failed for tally in rest]))
        return named

    def _work(self) -> Iterator[Metric]:
        counters = self._state.gmemd.counters
        yield CounterMetricFamily("gmemd_fds_sent", "Descriptors handed out to clients.", counters.fds_sent)
        yield _by("to", CounterMetricFamily, "gmemd_conversions", "Conversions of parts of guest_memfds.",
                  counters.conversions)
        yield _by("to", CounterMetricFamily, "gmemd_converted_bytes", "Bytes that changed their visibility.",
                  counters.converted_bytes)

    def _snapshots(self) -> Iterator[Metric]:
        known = self._state.gmemd.known_snapshots()
        unusable = sum([bool(entry.problem) for entry in known])
        yield _by("state", GaugeMetricFamily, "gmemd_snapshots", "Snapshots in the daemon's directory.",
                  {"usable": len(known) - unusable, "unusable": unusable})
        yield GaugeMetricFamily("gmemd_checkpoints", "Those of them with the state of a guest's devices.",
                                sum(["device-state" in entry.manifest for entry in known]))
        yield GaugeMetricFamily("gmemd_snapshots_bytes", "What they occupy on the disk; shared blocks count in each.",
                                sum([entry.bytes for entry in known]))

    def _custody(self) -> Iterator[Metric]:
        gmemd = self._state.gmemd
        yield CounterMetricFamily("gmemd_restored_objects", "Objects restored at start.", gmemd.counters.restored)
        yield GaugeMetricFamily("gmemd_runners", "Objects with a process that runs a guest on them.",
                                sum(backend.runner is not None for backend in gmemd.seen()))
        yield GaugeMetricFamily("gmemd_handovers", "Objects whose guest is on its way to another VMM.",
                                sum(backend.handover is not None for backend in gmemd.seen()))
        yield GaugeMetricFamily("gmemd_lost_objects", "Objects whose memory did not come back.",
                                sum(len(room.lost) for room in gmemd.seen_rooms()))
        yield GaugeMetricFamily("gmemd_unclaimed_fds", "Descriptors that came back without a record.",
                                len(gmemd.unclaimed))
        held, limit = gmemd.custody.room
        yield GaugeMetricFamily("gmemd_fdstore_entries", "Descriptors stored in the service manager.", held)
        yield GaugeMetricFamily("gmemd_fdstore_limit", "How many it can store; 0: there is no store.", limit)
        yield GaugeMetricFamily("gmemd_registry_writable", "1 if objects can be recorded, or need not be.",
                                float(not gmemd.custody.read_only))

    def _quotas(self) -> Iterator[Metric]:
        """One series for each thing that is limited, however many accounts there are."""
        ledger = self._state.gmemd.ledger
        if ledger is not None:
            fullest: dict[str, float] = {}
            for _, what, used, limit in ledger.limited():
                fullest.setdefault(what, used / limit if limit else 1.0)
            yield _by("what", GaugeMetricFamily, "gmemd_quota_fullest_ratio",
                      "The share of its limit that the account has which is nearest to it.",
                      dict(list(fullest.items())[:_QUOTAS]))

    async def _per_object(self) -> AsyncIterator[bytes]:
        backends, pace = await self._state.objects(), Pace()
        for name, text in (_SIZE, _RESIDENT):
            yield f"# HELP {name} {text}\n# TYPE {name} gauge\n".encode()
            for start in range(0, len(backends), _PORTION):
                lines = [line for backend in backends[start:start + _PORTION] for line in self._lines(name, backend)]
                yield "".join(lines).encode()
                await pace.keep()

    def _lines(self, name: str, backend: Any) -> Iterator[str]:
        """Names and types need no escaping."""
        called = self._state.gmemd.called(backend)
        if name is _SIZE[0]:
            yield f'{name}{{id="{called}",qom_type="{backend.qom_type}"}} {backend.memory_size}\n'
            return
        known = self._state.measurer.last(backend)
        for visibility, resident in ({} if known is None else known.by_visibility).items():
            yield f'{name}{{id="{called}",visibility="{visibility}"}} {resident}\n'


class _Families(list[Metric], Collector):
    """A collector of families that already exist."""

    def collect(self) -> list[Metric]:
        return self


def _by(label: str, kind: type[Any], name: str, text: str, values: Mapping[str, float]) -> Any:
    """A family with a series for each value of a label."""
    family = kind(name, text, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family


def _host(host: Host) -> Iterator[Metric]:
    if host.headroom is not None:
        yield GaugeMetricFamily("gmemd_headroom_bytes", "Memory that can still be allocated.", host.headroom.available)
        yield GaugeMetricFamily("gmemd_headroom_limit_bytes", "The limit of that: the machine's or a cgroup's.",
                                host.headroom.total)
    for name, text in (("total", "Huge pages in the pool"), ("free", "Huge pages that are free"),
                       ("reserved", "Free huge pages that are reserved"), ("surplus", "Huge pages beyond the pool")):
        family = GaugeMetricFamily(f"gmemd_hugepages_{'configured' if name == 'total' else name}",
                                   f"{text}; node \"\" is the whole machine.", labels=["page_size_bytes", "node"])
        for pool in host.pools[:24]:
            if name != "reserved" or pool.node is None:
                family.add_metric([str(pool.page_size), "" if pool.node is None else str(pool.node)],
                                  getattr(pool, name))
        yield family
