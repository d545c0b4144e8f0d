"""The metrics: names and values, how many there are, and what a real Prometheus makes of them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.process_collector import ProcessCollector

from gmemd.errors import QmpError
from gmemd.web.process import process_metrics
from tests.patience import PATIENCE
from tests.programs import ROOT, gmemctl, needs, output
from tests.web.site import Site

ALERTS = ROOT / "docs/prometheus/alerts.yml"
DASHBOARD = ROOT / "docs/prometheus/grafana.json"
SERIES_MAX = 300


def series(site: Site, query: str = "") -> dict[str, float]:
    """Every series by its name and labels, as written."""
    return {sample.name + json.dumps(sample.labels, sort_keys=True) if sample.labels else sample.name: sample.value
            for family in text_string_to_metric_families(site.get("/metrics" + query).text)
            for sample in family.samples}


def one(site: Site, name: str, **labels: str) -> float:
    return series(site)[name + (json.dumps(labels, sort_keys=True) if labels else "")]


def test_the_names_that_were_promised(site: Site) -> None:
    """Dashboards depend on them."""
    names = {name.partition("{")[0] for name in series(site)}
    promised = {"gmemd_build_info", "gmemd_objects", "gmemd_object_size_bytes", "gmemd_object_resident_bytes",
                "gmemd_fdstore_entries", "gmemd_qmp_commands_total", "gmemd_qmp_command_duration_seconds_bucket",
                "gmemd_qmp_connections", "gmemd_fds_sent_total", "gmemd_conversions_total",
                "gmemd_restored_objects_total", "gmemd_event_loop_lag_seconds", "process_resident_memory_bytes"}
    assert set() == promised - names


def test_sizes_and_residency_are_true(site: Site) -> None:
    """ram0 is allocated, cvm0 empty; a sweep that is older than a second is repeated."""
    assert one(site, "gmemd_object_size_bytes", qom_type="memory-backend-memfd") == 1 << 20
    assert one(site, "gmemd_object_size_bytes", qom_type="memory-backend-guest-memfd") == 64 << 12
    assert [one(site, "gmemd_object_resident_bytes", visibility=found)
                            for found in ("shared", "private")] == [1 << 20, 0]


def test_series_for_each_object_only_when_asked(site: Site) -> None:
    """They take the place of the sums, so that a sum over them is the same."""
    assert not any('"id"' in name for name in series(site))
    found = series(site, "?objects=1")
    sizes = {name: value for name, value in found.items() if name.startswith("gmemd_object_size_bytes")}
    assert sizes == {'gmemd_object_size_bytes{"id": "ram0", "qom_type": "memory-backend-memfd"}': 1 << 20,
            'gmemd_object_size_bytes{"id": "cvm0", "qom_type": "memory-backend-guest-memfd"}': 64 << 12}


def test_commands_are_counted_by_name_and_result() -> None:
    """What is not a command of the schema is counted as other, whatever it is called."""
    with Site() as site, site.client() as client:
        client.execute("query-version")
        for name in ("no-such", "nor-this", "object-del"):
            with pytest.raises(QmpError):
                client.execute(name)
        _, [fd] = client.execute_fds("memdev-get-fd", {"id": _made(client)})
        client.execute("memdev-convert", {"id": "g", "offset": 0, "size": 8192, "to": "private"})
        os.close(fd)
        found = series(site)
    start = "gmemd_qmp_commands_total"
    count = {tuple(json.loads(name.removeprefix(start)).values()): value
             for name, value in found.items() if name.startswith(start) and value}
    assert count == {("query-version", "ok"): 1, ("other", "error"): 2, ("object-del", "error"): 1,
                     ("object-add", "ok"): 1, ("memdev-get-fd", "ok"): 1, ("memdev-convert", "ok"): 1,
                     ("qmp_capabilities", "ok"): 1}
    assert [found[name] for name in (
        'gmemd_conversions_total{"to": "private"}', 'gmemd_converted_bytes_total{"to": "private"}',
        "gmemd_fds_sent_total")] == [1, 8192, 1]
    assert sum(count.values()) == sum(value for name, value in found.items()
                                      if name.startswith("gmemd_qmp_command_duration_seconds_count"))


def test_who_was_gone_before_the_greeting_is_not_connected() -> None:
    """A client that has left while it waited to be accepted is let go like any other one."""
    with Site() as site:
        os.kill(site.pid, signal.SIGSTOP)
        os.waitpid(site.pid, os.WUNTRACED)
        for _ in range(3):
            site.connect().close()
        os.kill(site.pid, signal.SIGCONT)
        with site.client() as client:
            client.execute("query-version")
            assert one(site, "gmemd_qmp_connections") == 1


def _made(client: Any) -> str:
    client.execute("object-add", {"qom-type": "memory-backend-guest-memfd", "id": "g", "size": 8192})
    return "g"


def test_sums_follow_the_objects(site: Site) -> None:
    """Number and bytes by type are those of the objects, also after some were deleted or refused."""
    with site.client() as client:
        for name in ("a", "b", "a"):
            with suppress(QmpError):
                client.execute("object-add", {"qom-type": "memory-backend-shm", "id": name, "size": 8192,
                                              "share": True})
        assert one(site, "gmemd_objects", qom_type="memory-backend-shm") == 2
        client.execute("object-del", {"id": "a"})
        assert one(site, "gmemd_objects", qom_type="memory-backend-shm") == 1
        assert one(site, "gmemd_object_size_bytes", qom_type="memory-backend-shm") == 8192
        client.execute("object-del", {"id": "b"})
    assert one(site, "gmemd_object_size_bytes", qom_type="memory-backend-shm") == 0


def test_process_metrics_are_the_usual_ones() -> None:
    """Names, types and help are those of prometheus_client's own collector, and so are values that stay the same."""
    usual = {family.name: family for family in ProcessCollector(registry=None).collect()}
    ours = {family.name: family for family in process_metrics()}
    assert {name: (family.type, family.documentation) for name, family in usual.items()} == {
        name: (family.type, family.documentation) for name, family in ours.items()}
    for name in ("process_max_fds", "process_start_time_seconds"):
        assert usual[name].samples[0].value == pytest.approx(ours[name].samples[0].value)
    # theirs counts the descriptor that it lists by
    assert usual["process_open_fds"].samples[0].value == ours["process_open_fds"].samples[0].value + 1


@needs("promtool")
@pytest.mark.e2e
@pytest.mark.parametrize("query", ["", "?objects=1"])
def test_promtool_finds_nothing_to_blame(site: Site, query: str) -> None:
    """Names, units and help texts follow Prometheus's conventions."""
    done = subprocess.run(["promtool", "check", "metrics"], input=site.get("/metrics" + query).body, check=False,
                          capture_output=True, timeout=PATIENCE)
    blame = [line for line in done.stdout.decode().splitlines() + done.stderr.decode().splitlines()
             if line and not line.startswith("process_")]
    assert blame == []


@needs("promtool")
@pytest.mark.e2e
def test_the_alert_rules_are_rules() -> None:
    """promtool reads the file that operators copy."""
    done = subprocess.run(["promtool", "check", "rules", ALERTS], check=False, capture_output=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_and_dashboard_ask_for_what_there_is(site: Site) -> None:
    """Every metric that they name is served."""
    served = {name.partition("{")[0] for name in series(site)} | {"gmemd_restored_objects_total"}
    for file in (ALERTS, DASHBOARD):
        named = set(re.findall(r"\b((?:gmemd|process)_[a-z_]+)\b(?!\.)", file.read_text()))
        assert set() == {name for name in named if name not in served}, file


def test_few_series_with_many_objects(crowd: tuple[Site, int], record_property: Any) -> None:
    """The number of series does not grow with the objects; with ?objects=1 each of them is there."""
    site, number = crowd
    found = series(site)
    began = time.monotonic()
    assert len(site.get("/metrics").body) > 0
    record_property("figure", f"/metrics with {number} objects: {len(found)} series, "
                              f"{1000 * (time.monotonic() - began):.0f} ms")
    assert len(found) <= SERIES_MAX
    text = site.get("/metrics?objects=1").text
    assert text.count("\ngmemd_object_size_bytes{id=") == number


def test_gmemctl_lists_many_objects(crowd: tuple[Site, int], record_property: Any) -> None:
    """`gmemctl ls` stays usable."""
    site, number = crowd
    began = time.monotonic()
    shown = output(gmemctl("--socket", str(site.sock), "ls"))
    record_property("figure", f"gmemctl ls with {number} objects: {time.monotonic() - began:.1f} s")
    assert shown.count("\no") == number


def test_scrapes_do_not_hold_qmp_up(crowd: tuple[Site, int], record_property: Any) -> None:
    """With many objects, no ping waits long for a scrape, a page or a list of objects."""
    site, _ = crowd
    with site.client() as client:
        def ping() -> float:
            began = time.perf_counter()
            client.execute("query-version")
            return time.perf_counter() - began

        alone = sorted(ping() for _ in range(300))
        with ExitStack() as stack:
            stack.enter_context(_scraping(site.url))
            beside = sorted(ping() for _ in range(1500))
    record_property("figure", "ping of query-version alone / beside constant scraping: median "
                              f"{1e3 * alone[150]:.2f} / {1e3 * beside[750]:.2f} ms, p99 "
                              f"{1e3 * alone[297]:.2f} / {1e3 * beside[1485]:.2f} ms, "
                              f"longest {1e3 * alone[-1]:.1f} / {1e3 * beside[-1]:.1f} ms")
    assert beside[750] < 0.05


def _scraping(url: str) -> subprocess.Popen[bytes]:
    """A process that asks for metrics, page and objects in turn until it is killed."""
    class Child(subprocess.Popen[bytes]):
        def __exit__(self, *_: object) -> None:
            self.kill()
            self.wait()

    return Child(["sh", "-c", f"while :; do for path in metrics metrics?objects=1 '' 'api/v1/objects?limit=100'; do "
                              f"curl -s -o /dev/null '{url}'$path; done; done"])


@pytest.fixture(scope="module")
def prometheus(tcp_site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Prometheus that scrapes the daemon all the time."""
    place = tmp_path_factory.mktemp("prometheus")
    (place / "prometheus.yml").write_text(f"""
global: {{scrape_interval: 200ms, scrape_timeout: 200ms, evaluation_interval: 200ms}}
rule_files: [{json.dumps(str(ALERTS))}]
scrape_configs:
  - job_name: gmemd
    static_configs: [{{targets: ["127.0.0.1:{tcp_site.port}"]}}]
""")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(
            ["prometheus", f"--config.file={place}/prometheus.yml", f"--storage.tsdb.path={place}/data",
             f"--web.listen-address=127.0.0.1:{port}"], stdout=subprocess.DEVNULL, stderr=log)
    try:
        yield _answering(f"http://127.0.0.1:{port}", process, place / "log")
    finally:
        process.kill()
        process.wait()


def _answering(url: str, process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/-/ready", timeout=PATIENCE).close()
            return url
        except OSError:
            time.sleep(0.05)
    raise AssertionError(log.read_text())


def ask(prometheus: str, query: str) -> list[Any]:
    """The result of an instant query, as soon as it has one."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with urllib.request.urlopen(f"{prometheus}/api/v1/query?query={urllib.parse.quote(query)}") as reply:
            result: list[Any] = json.load(reply)["data"]["result"]
        if result:
            return result
        time.sleep(0.05)
    raise AssertionError(f"no answer to {query}")


@needs("prometheus")
@pytest.mark.e2e
def test_prometheus_scrapes_and_answers(tcp_site: Site, prometheus: str) -> None:
    """What was made by object-add comes out of a query; rates and quantiles can be computed."""
    assert ask(prometheus, 'up{job="gmemd"} == 1')[0]["value"][1] == "1"
    assert str((1 << 20) + (64 << 12)) == ask(prometheus, "sum(gmemd_object_size_bytes)")[0]["value"][1]
    assert str(1 << 20) == ask(prometheus, 'gmemd_object_resident_bytes{visibility="shared"} > 0')[0]["value"][1]
    assert ask(prometheus, "gmemd_build_info")[0]["metric"]["kernel"] == "simulated"
    with tcp_site.client() as client:
        client.execute("query-version")
        assert ask(prometheus, 'gmemd_qmp_commands_total{command="query-version"}')  # a rate needs one before
        for _ in range(10):
            client.execute("query-version")
        assert ask(prometheus, 'rate(gmemd_qmp_commands_total{command="query-version"}[1m]) > 0')
        quantile = 'histogram_quantile(0.9, sum by (le) (rate(gmemd_qmp_command_duration_seconds_bucket[1m]))) > 0'
        assert ask(prometheus, quantile)


@needs("prometheus")
@pytest.mark.e2e
def test_prometheus_takes_the_alert_rules(prometheus: str) -> None:
    """They are loaded and evaluated without error, and a daemon that is well raises none."""
    ask(prometheus, "gmemd_ready == 1")
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        with urllib.request.urlopen(f"{prometheus}/api/v1/rules") as reply:
            [group] = json.load(reply)["data"]["groups"]
        if all(rule["health"] == "ok" for rule in group["rules"]):
            break
        time.sleep(0.05)
    assert {"ok"} == {rule["health"] for rule in group["rules"]}
    assert [rule["name"] for rule in group["rules"] if rule["state"] == "firing"] == []


@needs("prometheus")
@pytest.mark.e2e
def test_every_panel_of_the_dashboard_shows_something(tcp_site: Site, prometheus: str) -> None:
    """Prometheus takes each expression and has an answer, with the labels that its legend names."""
    asked = list(_panels(json.loads(DASHBOARD.read_text())["panels"]))
    assert len(asked) >= 15
    with tcp_site.client() as client:
        ask(prometheus, "gmemd_ready == 1")
        for _ in range(2):  # a rate needs one before
            with pytest.raises(QmpError):
                client.execute("object-del", {"id": "nobody"})
            ask(prometheus, 'gmemd_qmp_commands_total{command="object-del",result="error"}')
        for expression, legend in asked:
            query = expression.replace("$instance", ".+").replace("$__rate_interval", "1m")
            assert "$" not in query
            for series in ask(prometheus, query):
                assert set(re.findall(r"{{(\w+)}}", legend)) <= series["metric"].keys(), query


def _panels(panels: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Expression and legend of everything that is drawn."""
    for panel in panels:
        for target in panel.get("targets", []):
            yield target["expr"], target.get("legendFormat", "")
        yield from _panels(panel.get("panels", []))


async def test_few_series_with_many_commands() -> None:
    """Of a schema with very many commands the first that are used have series of their own, for good."""
    from gmemd.observe.counters import Counters
    from gmemd.web.prometheus import COMMANDS_NAMED, Scraper
    from gmemd.web.state import State
    from tests.commands.conftest import Machine

    machine = Machine()
    state = State(machine.dispatcher, lambda: 0)
    counters = machine.gmemd.counters = Counters((f"command-{number}" for number in range(500)), ())
    scraper = Scraper(state)

    async def counts() -> dict[str, float]:
        text = b"".join([portion async for portion in scraper.text(objects=False)]).decode()
        return {sample.labels["command"]: sample.value for family in text_string_to_metric_families(text)
                for sample in family.samples
                if sample.name == "gmemd_qmp_commands_total" and sample.labels["result"] == "ok"}

    counters.commands["command-7"].succeeded += 1
    assert await counts() == {"command-7": 1, "other": 0}
    for number in range(500):
        counters.commands[f"command-{number}"].succeeded += 1
    found = await counts()
    assert len(found) == COMMANDS_NAMED + 1
    assert found["command-7"] == 2
    assert found["other"] == 500 - COMMANDS_NAMED
    state.close()
    machine.gmemd.close()
