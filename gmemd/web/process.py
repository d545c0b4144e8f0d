"""The process metrics of Prometheus's conventions, for this process.

prometheus_client's own collector counts the descriptors by listing them, which takes 4 ms for 5,000; since Linux 6.2
the size of the directory is their number.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from gmemd.posix.boottime import on_the_wall

_PROC: Final = Path("/proc")
_TICKS: Final = os.sysconf("SC_CLK_TCK")


def process_metrics() -> Iterator[Metric]:
    """The families, under the names that prometheus_client gives them."""
    # proc_pid_stat(5): what follows the name begins with the third field
    fields = (_PROC / "self/stat").read_bytes().rpartition(b")")[2].split()
    ticks = [int(fields[number - 3]) for number in (14, 15, 22)]
    yield GaugeMetricFamily("process_virtual_memory_bytes", "Virtual memory size in bytes.", int(fields[23 - 3]))
    yield GaugeMetricFamily("process_resident_memory_bytes", "Resident memory size in bytes.",
                            int(fields[24 - 3]) * resource.getpagesize())
    yield GaugeMetricFamily("process_start_time_seconds", "Start time of the process since unix epoch in seconds.",
                            on_the_wall(ticks[2] / _TICKS))
    yield CounterMetricFamily("process_cpu_seconds", "Total user and system CPU time spent in seconds.",
                              (ticks[0] + ticks[1]) / _TICKS)
    place = _PROC / "self/fd"
    yield GaugeMetricFamily("process_open_fds", "Number of open file descriptors.",
                            place.stat().st_size or len(os.listdir(place)))
    yield GaugeMetricFamily("process_max_fds", "Maximum number of open file descriptors.",
                            resource.getrlimit(resource.RLIMIT_NOFILE)[0])
