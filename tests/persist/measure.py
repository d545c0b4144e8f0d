"""Measure what durability costs: `python -m tests.persist.measure [DIRECTORY]`, with a keeper of its own.

It prints the quartiles, in microseconds, of a barrier's round trip, and per object of durable adds and removes, waiting
for each and by 64: record, FDSTORE or FDSTOREREMOVE, SQLite transaction, barrier. DIRECTORY should be on a tmpfs.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from gmemd.persist.custody import Custody
from gmemd.persist.fdstore import FdStore
from gmemd.persist.notify import Notifier, listen_fds, store_limit
from gmemd.persist.record import Record
from gmemd.persist.registry import Registry
from gmemd.persist.waits import Wait, wait_for

ARGUMENTS = {
    "qom-type": "memory-backend-memfd", "id": "ram0", "size": 1 << 30, "share": True, "prealloc": False, "dump": True,
    "merge": True, "hugetlb": False, "seal": True, "x-use-canonical-path-for-ramblock-id": True,
}  # fmt: skip
WARM_UP = 100


def as_daemon(directory: str) -> None:
    """The keeper's child: measure, then end the keeper."""
    notifier = Notifier.from_environ(os.environ)
    assert notifier is not None
    custody = Custody(Registry(f"{directory}/registry"), notifier, FdStore(store_limit(os.environ)))
    custody.restore(listen_fds(os.environ))
    notifier.ready()
    memory = [os.memfd_create(str(number)) for number in range(64)]

    def barrier() -> None:
        reader = notifier.barrier()
        wait_for(Wait("readable", reader, 60))
        notifier.passed(reader)

    report("barrier", 1, timed(2000, barrier))
    for batch, rounds in ((1, 2000), (64, 60)):
        adds, removes = [], []
        for _ in range(rounds):
            records = [Record(f"ram{n}", "memory-backend-memfd", ARGUMENTS, "memfd", 1 << 30) for n in range(batch)]

            def add(records: list[Record] = records) -> None:
                for record, fd in zip(records, memory, strict=False):
                    custody.reserve()
                    custody.add(record, fd)
                custody.flush_blocking()

            def remove(records: list[Record] = records) -> None:
                for record in records:
                    custody.remove(record)
                custody.flush_blocking()

            adds += timed(1, add)
            removes += timed(1, remove)
        report(f"add by {batch}", batch, adds)
        report(f"remove by {batch}", batch, removes)
        report(f"both by {batch}", batch, [sum(pair) for pair in zip(adds, removes, strict=True)])
    os.kill(os.getppid(), signal.SIGTERM)


def timed(times: int, what: Callable[[], None]) -> list[float]:
    """Seconds of each call."""
    result = []
    for _ in range(times):
        start = time.perf_counter()
        what()
        result.append(time.perf_counter() - start)
    return result


def report(what: str, number: int, seconds: list[float]) -> None:
    quartiles = statistics.quantiles(seconds[min(WARM_UP, len(seconds) // 4) :])
    print(f"{what:14}", *(f"{quartile / number * 1e6:8.1f}" for quartile in quartiles), flush=True)


def main() -> None:
    if "NOTIFY_SOCKET" in os.environ:
        as_daemon(sys.argv[1])
        return
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if sys.argv[1:] else "/dev/shm") as directory:
        daemon = [sys.executable, "-m", "tests.persist.measure", directory]
        print(f"{'us':14}{'25 %':>9}{'50 %':>9}{'75 %':>9}", flush=True)
        keeper = [sys.executable, "-m", "gmemd.keeper.keeper", "--listen", f"{directory}/sock", "--exec", *daemon]
        subprocess.run(keeper, check=True)


if __name__ == "__main__":
    main()
