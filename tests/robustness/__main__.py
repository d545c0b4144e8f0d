"""All of it, and the figures: python -m tests.robustness [kills] [errors] ..."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from gmemd.errors import QmpError
from tests.commands.test_indistinguishable import answers
from tests.robustness import damage, hostile, jumps, quotas, replies, stored
from tests.robustness.fences import strike
from tests.robustness.ladder import climb, restart_time
from tests.robustness.moves import Pair, every_message
from tests.robustness.pairs import Alone, Kept, clash, pairs
from tests.robustness.scenarios import SCENARIOS
from tests.robustness.sweep import Tally, errors, kills
from tests.robustness.waits import Scale, measure, table
from tests.robustness.world import World, Wrong
from tests.snapshots.model import Model
from tests.snapshots.strikes import ACTS, ERRORS, sweep_all

Part = Callable[[], int]


def _sweep(title: str, strike: Callable[..., Tally]) -> int:
    """Strike every scenario everywhere; how much was wrong."""
    begun, total = time.monotonic(), Tally()
    print(f"== {title} ==")
    for scenario in SCENARIOS:
        with World() as world:
            tally = strike(world, scenario, strict=False)
        total += tally
        print(f"{scenario.name:45} {tally.points:5}  {_results(tally)}", flush=True)
        for words in tally.wrong:
            print(f"    WRONG: {words[:1000]}")
    seconds = time.monotonic() - begun
    print(f"{'in all':45} {total.points:5}  {_results(total)}, {seconds:.0f} s")
    print("struck at: " + ", ".join(f"{name} {count}" for name, count in total.calls.most_common()) + "\n")
    return len(total.wrong)


def _results(tally: Tally) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(tally.results.items()))


def all_kills() -> int:
    return _sweep("SIGKILL at every system call", kills)


def all_errors() -> int:
    return _sweep("an error at every system call", errors)


def all_replies() -> int:
    """Three thousand kills while replies leave; how much was wrong."""
    begun = time.monotonic()
    print("== killed while its replies leave ==", flush=True)
    with World() as world:
        try:
            done = replies.run(world, 3000)
        except (Wrong, OSError) as exc:
            print(f"    WRONG: {str(exc)[:1000]}")
            return 1
    print(f"{', '.join(f'{count} {name}' for name, count in done.items())}, {time.monotonic() - begun:.0f} s\n")
    return 0


def all_damage() -> int:
    """Every kind of damage to the registry; how much was wrong."""
    print("== a damaged registry ==")
    results, wrong = Counter[str](), 0
    with World() as world:
        for what, how in (*damage.truncations(), *damage.replacements(), *damage.flips(17)):
            try:
                results[damage.harm(world, what, how)] += 1
            except Wrong as exc:
                print(f"    WRONG: {str(exc)[:1000]}")
                wrong += 1
    print(f"{sum(results.values())} damages: {dict(sorted(results.items()))}, no memory dropped\n")
    return wrong


def whole_ladder() -> int:
    """Two hundred restarts."""
    print("== the restart ladder ==")
    print(climb(200) + "\n")
    return 0


def restart() -> int:
    """How long a restart takes."""
    print("== restart time ==")
    print(restart_time() + "\n")
    return 0


def all_pairs() -> int:
    """All ordered pairs of two clients' changes, alone and kept; how much was wrong."""
    print("== two clients change one object ==")
    wrong = 0
    for make, after, title in ((Alone, 0.0, "alone, one turn"), (Alone, 0.002, "alone, 2 ms apart"),
                               (Kept, 0.0, "kept, one turn, then SIGKILL"),
                               (Kept, 0.002, "kept, 2 ms apart, then SIGKILL")):
        begun, count, place = time.monotonic(), 0, make()
        for first, second in pairs(place):
            count += 1
            try:
                clash(place, first, second, after)
            except (Wrong, AssertionError, QmpError, OSError) as exc:
                print(f"    WRONG: {first} / {second}: {str(exc)[:1000]}", flush=True)
                wrong += 1
                place.close()
                place = make()
        place.close()
        print(f"{title:45} {count:5} pairs, {time.monotonic() - begun:.0f} s", flush=True)
    return wrong


def all_snapshots() -> int:
    """Strike every act of the snapshots' engine at every system call; how much was wrong."""
    print("== snapshots: SIGKILL, and an error, at every system call ==")
    wrong = 0
    with TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as place:
        for act in ACTS.values():
            for errors_, title in (((), "killed"), (ERRORS, "failing")):
                begun = time.monotonic()
                tally = sweep_all(Path(place) / "act", act, errors=errors_, strict=False)
                print(f"{act.name + ', ' + title:45} {sum(tally.calls.values()):5}  {dict(tally.results)},"
                      f" {time.monotonic() - begun:.0f} s", flush=True)
                for words in tally.wrong:
                    print(f"    WRONG: {words[:1000]}")
                wrong += len(tally.wrong)
    return wrong


def all_stored() -> int:
    """Kill the daemon at a hundred calls of each act on snapshots; how much was wrong."""
    print("== snapshots: the daemon is killed ==")
    wrong = 0
    for name, act in stored.ACTS.items():
        begun = time.monotonic()
        with World() as world:
            wrong += stored.sweep(world, act, 100, print)
        print(f"{name:45} {time.monotonic() - begun:.0f} s", flush=True)
    return wrong


def whole_model() -> int:
    """Ten thousand random operations against the model; how much was wrong."""
    print("== snapshots: 10,000 operations against a model ==")
    with TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as place:
        model = Model(Path(place), seed=10_000)
        try:
            for _ in range(10_000):
                model.step()
        except AssertionError as exc:
            print(f"    WRONG: {str(exc)[:1000]}")
            return 1
        finally:
            model.close()
    print(f"{model.done}\n")
    return 0


def snapshot_damage() -> int:
    """Fifty flipped bits and truncations of each file, and 1 GiB in 1 TiB; how much was wrong."""
    print("== snapshots: damage, and what becomes resident ==", flush=True)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/snapshots/test_damage.py",
                           "tests/snapshots/test_residency.py"],
                          env={**os.environ, "GMEMD_PLACES": "50", "GMEMD_POPULATED": "1024"}, check=False)
    return done.returncode


def longest_waits() -> int:
    """How long other clients wait; a verdict, which counts as nothing wrong: it is about the machine, too."""
    print("== longest waits ==")
    print(table(measure(Scale())[0]) + "\n")
    return 0


def all_moves() -> int:
    """A move struck at every message, and either daemon killed at 200 of its system calls; how much was wrong."""
    print("== a move between two gmemd ==")
    begun, points, wrong = time.monotonic(), Counter[str](), 0
    with Pair() as pair:
        for at, when, end, asks in every_message():
            points[end] += 1
            wrong += _struck(f"{end} ends {when} message {at}", partial(pair.strike_message, at, when, end, asks))
        print(f"{sum(points.values())} strikes at messages, {time.monotonic() - begun:.0f} s", flush=True)
        for side in ("source", "destination"):
            length = pair.strike_call(0, side, "source")[1]  # most of them look for who holds the memory
            for at in sorted({*range(1, length, length // 100 + 1), *range(max(1, length - 500), length, 5)}):
                points[f"{side} at a call"] += 1
                wrong += _struck(f"{side} killed at call {at}", partial(pair.strike_call, at, side, "destination"))
    print(f"{sum(points.values())} strikes: {dict(points)}, {time.monotonic() - begun:.0f} s\n")
    return wrong


def _struck(what: str, strike: Callable[[], object]) -> int:
    """Strike; 1 if something is wrong, which is printed."""
    try:
        strike()
    except (Wrong, AssertionError, QmpError, OSError) as exc:
        print(f"    WRONG: {what}: {str(exc)[:1000]}", flush=True)
        return 1
    return 0


def all_fences() -> int:
    """Kills at every twentieth system call of a copy for which a process stands still; how much was wrong."""
    begun = time.monotonic()
    print("== killed while a process stands still ==")
    with World() as world:
        tally = strike(world, step=20, first=1)
    print(f"{tally.points} kills  {_results(tally)}, {time.monotonic() - begun:.0f} s\n")
    return 0


def all_answers() -> int:
    """Every command, with each of its members, about what others have, and what does not exist."""
    print("== what others have does not exist ==")
    here = os.getcwd()
    with TemporaryDirectory() as folder:
        host = Path(folder) / "host"
        try:
            empty = asyncio.run(answers(host, filled=False, long=True))
            full = asyncio.run(answers(host, filled=True, long=True))
        finally:
            os.chdir(here)
    told = [case for (case, absent), (_, foreign) in zip(empty, full, strict=True) if absent != foreign]
    for case in told:
        print(f"    WRONG: {case}")
    print(f"{len(full)} requests of {len({case[0] for case, _ in full})} commands, {len(told)} answered otherwise\n")
    return len(told)


def hostile_clients() -> int:
    """Hostile and careless clients; how much was wrong."""
    print("== hostile clients ==", flush=True)
    try:
        print(hostile.table(hostile.suite(hostile.Scale(), policy=True)) + "\n")
    except Wrong as exc:
        print(f"    WRONG: {exc}")
        return 1
    return 0


def whole_day() -> int:
    """Twenty-four hours of a clock that jumps; how much was wrong."""
    print("== 24 hours of clock jumps ==", flush=True)
    begun = time.monotonic()
    try:
        print(f"{jumps.live(18 * 60)}, {time.monotonic() - begun:.0f} s\n")
    except Wrong as exc:
        print(f"    WRONG: {exc}")
        return 1
    return 0


def all_quotas() -> int:
    """Fifty thousand steps of clients with limits, failing flushes and kills; how much was wrong."""
    begun = time.monotonic()
    print("== the ledger of quotas is what there is: 50,000 steps ==")
    try:
        found = quotas.run(50_000)
    except AssertionError as exc:
        print(f"    WRONG: {str(exc)[:1000]}")
        return 1
    print(f"{', '.join(f'{name} {count}' for name, count in found.most_common())}, {time.monotonic() - begun:.0f} s\n")
    return 0


def all_claims() -> int:
    """Kills of driver, gmemd and kubelet at every step of what is done for a claim; how much was wrong."""
    from tests.kubernetes.apiserver import ApiServer
    from tests.kubernetes.sweep import sweep

    begun = time.monotonic()
    print("== killed while a claim is prepared or released ==", flush=True)
    with ApiServer() as api:
        tally = sweep(api, strict=False, say=partial(print, flush=True))
    print(f"{sum(tally.points.values())} points: {tally.points}, {time.monotonic() - begun:.0f} s\n")
    return len(tally.wrong)


PARTS: dict[str, Part] = {"pairs": all_pairs, "kills": all_kills, "errors": all_errors, "replies": all_replies,
                          "moves": all_moves,
                          "damage": all_damage, "ladder": whole_ladder, "restart": restart, "waits": longest_waits,
                          "snapshots": all_snapshots, "stored": all_stored, "model": whole_model,
                          "snapshot-damage": snapshot_damage, "fences": all_fences, "answers": all_answers,
                          "hostile": hostile_clients, "clock": whole_day,
                          "quotas": all_quotas, "claims": all_claims}


def main(names: list[str]) -> int:
    """Run the parts asked for, or all; 1 when anything was wrong."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by way of every World's end
    wrong = sum([PARTS[name]() for name in names or PARTS])
    print(f"wrong: {wrong}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
