"""From samples to the report: medians, ratios against the targets, the machine."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median

from measure import Sample
from rows import BASE, GAINS, Row, Target

Results = Mapping[str, Mapping[str, "list[Sample] | str"]]  # row, subject: its samples, or why there are none

_ROOT = Path(__file__).resolve().parent.parent

_HEAD = """\
# What gmemd was measured to do

Made by `bench/run` in {minutes:.0f} minutes; what it does is in [README.md](README.md).
"""
_TARGETS_HEAD = """
## Against the targets

| measure | gmemd | compared with | | ratio | target | |
|---|--:|---|--:|--:|--:|---|"""
_AGAINST_HEAD = """
## Against {commit}

How many times as good as that commit: the ratio of the medians, the least and most of the repetitions' own ratios, and
that of the server's CPU times for a reply. Targets are set against {base}.

| row | subject | now | before | ratio | least | most | CPU | target | |
|---|---|--:|--:|--:|--:|--:|--:|--:|---|"""
_FIGURES_HEAD = """
## All figures

Medians and ranges. Client: the share of the time in which the client program computed.
Server: its CPU time for a reply.

| row | subject | median | least | most | client | server |
|---|---|--:|--:|--:|--:|--:|"""


_STEPS_HEAD = """
## Where the time goes

What `steps.py` found: each step alone, warm, the least of many; microseconds. The rest of what a row above
shows is the event loop's turn (see `asyncio` in row ping: a bare loop that reads and answers), waking two
processes, and caches that are cold after that: a step in place takes one and a half to two times as long.

| measure | step | µs |
|---|---|--:|"""


def markdown(rows: Iterable[Row], results: Results, steps: Mapping[str, Mapping[str, float]], *,
             seconds: float, reps: int, pythons: Sequence[str], against: str = "", compiled: bool = False) -> str:
    """The whole report; `pythons`: which one runs gmemd, and how others compare; `against`: another commit."""
    rows = list(rows)
    lines = [_HEAD.format(minutes=seconds / 60)]
    lines += [f"- {name}: {words}" for name, words in _circumstances(reps, pythons, compiled=compiled)]
    lines.append(_TARGETS_HEAD)
    for row in rows:
        lines += _comparison(row, results[row.name])
    if against:
        lines.append(_AGAINST_HEAD.format(commit=against, base=BASE))
        for row in rows:
            wanted = GAINS[row.name][compiled] if against.startswith(BASE) and row.name in GAINS else 0
            lines += _progress(row, results[row.name], wanted)
    lines.append(_FIGURES_HEAD)
    for row in rows:
        lines += _figures(row, results[row.name])
    if steps:
        lines.append(_STEPS_HEAD)
        lines += [f"| {name} | {step} | {value:g} |" for name, parts in steps.items() for step, value in parts.items()]
    return "\n".join(lines) + "\n"


def _circumstances(reps: int, pythons: Sequence[str], *, compiled: bool) -> list[tuple[str, str]]:
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    commit = _output("git", "-C", str(_ROOT), "rev-parse", "HEAD")
    if _output("git", "-C", str(_ROOT), "status", "--porcelain", "--", "gmemd"):
        commit += " with changes"
    if compiled:
        commit += ", compiled"
    return [
        ("date", time.strftime("%Y-%m-%d")),
        ("gmemd", commit),
        ("repetitions", f"{reps}, interleaved"),
        ("machine", f"{os.cpu_count()} x {cpu}, {memory:.0f} GiB"),
        ("kernel", platform.release()),
        ("Python", pythons[0]),
        *(("another Python", words) for words in pythons[1:]),
        ("QEMU", _output("qemu-system-x86_64", "--version").partition("\n")[0]),
        ("qsd", _output("qemu-storage-daemon", "--version").partition("\n")[0]),
    ]


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return "not installed"


def _comparison(row: Row, samples: Mapping[str, list[Sample] | str]) -> list[str]:
    ours = samples[next(iter(row.subjects))]
    lines = []
    for target in row.targets:
        theirs = samples.get(target.subject, [])
        cells = [row.title, _value(row, ours), target.subject, _value(row, theirs),
                 *_verdict(row, target, ours, theirs)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _value(row: Row, samples: list[Sample] | str) -> str:
    if isinstance(samples, str):
        return "–"
    return _number(median(sample.value for sample in samples)) + f" {row.unit}" if samples else ""


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _verdict(row: Row, target: Target, ours: list[Sample] | str,
             theirs: list[Sample] | str) -> tuple[str, str, str]:
    """Ratio, target, and whether it is met."""
    if isinstance(ours, str) or isinstance(theirs, str):
        return "", _wanted(row, target), ours if isinstance(ours, str) else str(theirs)
    value = median(sample.value for sample in ours)
    if target.limit:
        return "", _wanted(row, target), "met" if value <= target.limit else "**missed**"
    ratio = value / median(sample.value for sample in theirs)
    gain = ratio if row.more_is_better else 1 / ratio
    shown = gain if target.factor >= 1 or row.more_is_better else ratio
    return f"{shown:.2f}×", _wanted(row, target), "met" if gain >= target.factor else "**missed**"


def _wanted(row: Row, target: Target) -> str:
    if target.limit:
        return f"≤ {target.limit:g} {row.unit}"
    if target.factor >= 1 or row.more_is_better:
        return f"≥ {target.factor:g}×"
    return f"≤ {1 / target.factor:g}×"


def _progress(row: Row, samples: Mapping[str, list[Sample] | str], wanted: float) -> list[str]:
    """The subjects that have a twin of another commit; the first is to be `wanted` times as good (0: no matter)."""
    lines = []
    for label, ours in samples.items():
        theirs = samples.get(label.replace("gmemd", "before"), [])
        if not label.startswith("gmemd") or not theirs:
            continue
        cells = [row.name, label, _value(row, ours), _value(row, theirs)]
        if isinstance(ours, str) or isinstance(theirs, str):
            cells += ["", "", "", "", "", ours if isinstance(ours, str) else str(theirs)]
        else:
            cells += _gains(row, ours, theirs, wanted if label == next(iter(row.subjects)) else 0)
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _gains(row: Row, ours: Sequence[Sample], theirs: Sequence[Sample], wanted: float) -> list[str]:
    """Ratio of the medians, least and most of the pairs', ratio of CPU times, target, verdict."""
    def gain(now: float, before: float) -> float:
        return now / before if row.more_is_better else before / now

    ratio = gain(median(sample.value for sample in ours), median(sample.value for sample in theirs))
    pairs = [gain(now.value, before.value) for now, before in zip(ours, theirs, strict=True)]
    costs = [median(sample.server_us or 0 for sample in samples) for samples in (theirs, ours)]
    return [*(f"{value:.2f}×" for value in (ratio, min(pairs), max(pairs))),
            f"{costs[0] / costs[1]:.2f}×" if costs[1] else "",
            *([f"≥ {wanted:g}×", "met" if ratio >= wanted else "**missed**"] if wanted else ["", ""])]


def _figures(row: Row, samples: Mapping[str, list[Sample] | str]) -> list[str]:
    lines = []
    for subject, taken in samples.items():
        if isinstance(taken, str):
            lines.append(f"| {row.name} | {subject} | {taken} | | | | |")
            continue
        values = [sample.value for sample in taken]
        shares = [sample.client_share for sample in taken if sample.client_share is not None]
        costs = [sample.server_us for sample in taken if sample.server_us is not None]
        cells = [row.name, subject, f"{_number(median(values))} {row.unit}", _number(min(values)),
                 _number(max(values)), f"{median(shares):.0%}" if shares else "",
                 f"{median(costs):.2f} µs" if costs else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
