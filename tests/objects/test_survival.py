"""What an object outlives, for each manager and each kind of memory, and what systemd says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gmemd.objects.survival import fates
from gmemd.persist.keeping import SPARED, Keeping, Unit
from gmemd.persist.liveupdate import judge
from gmemd.persist.manager import Manager, _keeping
from gmemd.persist.unit import ask, own_unit, version_of

ALWAYS = ["vmm-crash", "vmm-replaced", "client-disconnect"]
CRASH = [*ALWAYS, "gmemd-crash", "gmemd-upgrade"]
STOP = [*CRASH, "service-stop", "soft-reboot"]
EVENTS = [*STOP, "kexec", "power-loss"]
SHIPPED = Unit(stored=9)


def systemd(**changed: object) -> Keeping:
    """systemd with the shipped unit, but for these of its properties; 9 descriptors are held."""
    return Keeping("systemd", unit=SHIPPED._replace(**changed), held=9)  # type: ignore[arg-type]


def carrying(**changed: object) -> Keeping:
    """The same on a host with live update."""
    return systemd(**{"kexec": ("yes", ""), **changed})._replace(live_update=True, copied=True)


@pytest.mark.parametrize(("keeping", "kind", "kept", "survived"), [
    (Keeping(), "memfd", False, ALWAYS),
    (Keeping("keeper"), "memfd", True, CRASH),
    (Keeping("keeper"), "memfd", False, ALWAYS),
    (Keeping("keeper", pid=os.getppid()), "memfd", True, CRASH),
    (Keeping("keeper", pid=os.getpid()), "memfd", True, ALWAYS),
    (systemd(), "guest-memfd", True, STOP),
    (systemd(), "guest-memfd", False, ALWAYS),
    (systemd(preserve=""), "guest-memfd", True, CRASH),
    (systemd(preserve="restart"), "memfd", True, CRASH),
    (systemd(preserve="no"), "memfd", True, ALWAYS),
    (systemd(preserve="on-success"), "memfd", True, CRASH),
    (systemd(referred=False), "memfd", True, CRASH),
    (systemd(loaded=False), "memfd", True, ALWAYS),
    (systemd(nofile=9 + SPARED), "memfd", True, STOP),
    (systemd(nofile=8 + SPARED), "memfd", True, ALWAYS),
    (systemd(restart="no"), "memfd", True, STOP),
    (systemd(restart="no", preserve="restart"), "memfd", True, [*ALWAYS, "gmemd-upgrade"]),
    (systemd(restart="on-failure", preserve="restart"), "memfd", True, CRASH),
    (systemd(restart="on-success", preserve=""), "memfd", True, [*ALWAYS, "gmemd-upgrade"]),
    (systemd()._replace(missing=1), "memfd", True, ALWAYS),
    (Keeping("systemd"), "memfd", True, ALWAYS),
    (Keeping("systemd", old=True), "memfd", True, ALWAYS),
    (systemd()._replace(user=True), "memfd", True, [*CRASH, "service-stop"]),
    (carrying(), "memfd", True, [*STOP, "kexec"]),
    (carrying(), "stand-in", True, [*STOP, "kexec"]),
    (carrying()._replace(filling=8, available=8), "memfd", True, [*STOP, "kexec"]),
    (carrying()._replace(filling=9, available=8), "memfd", True, STOP),
    (carrying()._replace(copied=False), "memfd", True, STOP),
    (carrying()._replace(live_update=False), "memfd", True, STOP),
    (carrying(kexec=("no", "live update needs systemd 261 (this is 257)")), "memfd", True, STOP),
    (carrying(preserve="restart"), "memfd", True, CRASH),
])
def test_fates(keeping: Keeping, kind: str, kept: bool, survived: list[str]) -> None:
    """Each event is answered, and where the answer is not yes there is advice."""
    found = fates(kind, kept=kept, opted_out=not kept, keeping=keeping)
    if kind in ("guest-memfd", "stand-in"):  # no QEMU can open it
        survived = [event for event in survived if event != "vmm-replaced"]
    assert [fate.event for fate in found if fate.survives] == survived
    assert [fate.event for fate in found] == EVENTS
    assert all(bool(fate.advice) is not fate.survives for fate in found)


@pytest.mark.parametrize(("keeping", "kind", "answers"), [
    (Keeping("systemd"), "memfd", ["unknown", "unknown", "unknown", "unknown", "no", "no"]),
    (Keeping("systemd", old=True), "memfd", ["unknown", "unknown", "no", "no", "no", "no"]),
    (Keeping("systemd", live_update=True), "memfd", ["unknown"] * 5 + ["no"]),
    (systemd(preserve="on-success"), "memfd", ["yes", "yes", "unknown", "unknown", "no", "no"]),
    (carrying(kexec=("unknown", "see")), "memfd", ["yes", "yes", "yes", "yes", "unknown", "no"]),
    (carrying()._replace(user=True), "memfd", ["yes", "yes", "yes", "unknown", "unknown", "no"]),
    (carrying(), "guest-memfd", ["yes", "yes", "yes", "yes", "no", "no"]),
    (carrying(), "hugetlb-memfd", ["yes", "yes", "yes", "yes", "no", "no"]),
    (systemd(preserve="no")._replace(live_update=True), "memfd", ["no"] * 6),
    (systemd()._replace(user=True), "memfd", ["yes", "yes", "yes", "unknown", "no", "no"]),
])
def test_what_is_not_known_is_not_yes(keeping: Keeping, kind: str, answers: list[str]) -> None:
    """Where systemd has not said, or nobody has tried, that is the answer."""
    found = fates(kind, kept=True, opted_out=False, keeping=keeping)
    assert [fate.answer for fate in found[3:]] == answers


@pytest.mark.parametrize(("keeping", "advice"), [
    (systemd(preserve="restart"), "set FileDescriptorStorePreserve=yes (it is restart), then systemctl daemon-reload"),
    (systemd(referred=False),
     "systemd forgets a stopped service that nothing refers to: systemctl enable gmemd.socket"),
    (systemd(loaded=False), "the unit file of gmemd.service is missing: restore it, then systemctl daemon-reload"),
    (systemd(nofile=20), "the next start needs 9 descriptors: set LimitNOFILE= to at least 73 (it is 20), "
                         "then systemctl daemon-reload"),
    (systemd(limit=4)._replace(missing=5), "systemd holds 4 of 9 descriptors: set FileDescriptorStoreMax= to at "
                                           "least 9 (it is 4), then systemctl daemon-reload"),
    (Keeping("systemd", name="x.service", user=True),
     "systemd could not be asked: see systemctl --user show -p FileDescriptorStorePreserve,NFileDescriptorStore,"
     "LimitNOFILESoft x.service"),
])
def test_the_advice_names_what_to_do(keeping: Keeping, advice: str) -> None:
    [stop] = [fate for fate in fates("memfd", kept=True, opted_out=False, keeping=keeping)
              if fate.event == "service-stop"]
    assert stop.advice == advice


def test_memory_that_would_come_back_read_only() -> None:
    """A seal that a live update turns into one against writing."""
    for freezes in (False, True):
        [kexec] = [fate for fate in fates("memfd", kept=True, opted_out=False, keeping=carrying(), freezes=freezes)
                   if fate.event == "kexec"]
        assert (kexec.survives, "vm.memfd_noexec" in kexec.advice) == (not freezes, freezes)


@pytest.mark.parametrize(("environ", "keeping"), [
    ({}, Keeping()),
    ({"NOTIFY_SOCKET": "/tmp/x.notify", "FDSTORE": "9"}, Keeping("keeper", pid=os.getppid())),
    ({"NOTIFY_SOCKET": "/run/systemd/notify"}, Keeping("systemd", old=True)),
    ({"NOTIFY_SOCKET": "/run/systemd/notify", "FDSTORE": "9"}, Keeping("systemd")),
    ({"NOTIFY_SOCKET": "/run/user/9/systemd/notify", "FDSTORE": "9"}, Keeping("systemd", user=True)),
])
def test_the_manager_is_known_by_its_environment(environ: dict[str, str], keeping: Keeping) -> None:
    """systemd by its notify socket, and whether it announces the size of its store."""
    found = _keeping(dict(environ))
    assert found._replace(live_update=False, name=keeping.name) == keeping
    assert Manager({}).keeping == Keeping()


@pytest.mark.parametrize(("text", "name"), [
    ("0::/system.slice/gmemd.service\n", "gmemd.service"),
    ("0::/system.slice/gmemd@a.service/worker\n", "gmemd@a.service"),
    ("12:memory:/x.service\n1:name=systemd:/system.slice/b.service\n0::/c.service\n", "b.service"),
    ("0::/user.slice/user-9.slice/user@9.service/app.slice/d.service\n", "d.service"),
    ("0::/\n", ""), ("0::/user.slice/session-2.scope\n", ""), ("", ""), ("nonsense\n", ""),
])  # fmt: skip
def test_own_unit(text: str, name: str) -> None:
    """The service is the last one on the way to this process's control group."""
    assert own_unit(text) == name


class FakeSystemctl:
    """A program of that name, which says what it is told to say of each unit, and notes what it was asked."""

    def __init__(self, directory: Path) -> None:
        self.asked = directory / "asked"
        self.directory = directory
        program = directory / "systemctl"
        program.write_text(f'#!/bin/sh\necho "$*" >>{self.asked}\nfor name; do :; done\n'
                           f'case $name in --*) name=manager;; esac\ncat "{directory}/$name" 2>/dev/null\n')
        program.chmod(0o755)

    def says(self, name: str, **properties: object) -> None:
        (self.directory / name).write_text("".join(f"{key}={value}\n" for key, value in properties.items()))


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSystemctl:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return FakeSystemctl(tmp_path)


def test_systemd_is_asked(systemctl: FakeSystemctl) -> None:
    """What it says is taken as it is; an enabled socket, or a new systemd, keeps a stopped service loaded."""
    service = {"LoadState": "loaded", "FileDescriptorStorePreserve": "yes", "FileDescriptorStoreMax": 7,
               "NFileDescriptorStore": 3, "LimitNOFILESoft": 99, "Restart": "always", "TriggeredBy": "g.socket"}
    systemctl.says("g.service", **service)
    systemctl.says("g.socket", WantedBy="sockets.target", RequiredBy="")
    systemctl.says("manager", Version="257.9-1~deb13u1")
    unit = Unit("g.service", preserve="yes", limit=7, stored=3, nofile=99, restart="always", referred=True,
                kexec=judge(257))
    assert ask("g.service") == unit
    systemctl.says("g.socket", WantedBy="", RequiredBy="g.service")
    assert ask("g.service") == unit._replace(referred=False)
    systemctl.says("manager", Version="262.1-2")
    assert ask("g.service") == unit._replace(kexec=judge(262))
    systemctl.says("g.service", **service | {"FileDescriptorStorePreserve": "no", "LimitNOFILESoft": "infinity",
                                             "LoadState": "not-found"})
    assert ask("g.service") == Unit("g.service", False, "no", 7, 3, 1 << 30)
    assert ask("g.service", user=True) is not None
    assert "--user show" in systemctl.asked.read_text().splitlines()[-1]


def test_systemd_before_254(systemctl: FakeSystemctl) -> None:
    """It does not know FileDescriptorStorePreserve=, and so does not list it."""
    systemctl.says("g.service", LoadState="loaded", FileDescriptorStoreMax=4, NFileDescriptorStore=0,
                   LimitNOFILESoft=99, Restart="always", TriggeredBy="")
    assert ask("g.service") == Unit("g.service", preserve="", limit=4, nofile=99)


def test_no_answer(systemctl: FakeSystemctl, monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence, nonsense, a hanging bus and no systemctl at all are no answer."""
    assert ask("g.service") is None
    systemctl.says("g.service", nonsense="")
    assert ask("g.service") is None
    (systemctl.directory / "systemctl").write_text("#!/bin/sh\nexec sleep 1000\n")
    assert ask("g.service", timeout=0.1) is None
    (systemctl.directory / "systemctl").write_text("#!/bin/sh\necho LoadState=loaded\nexit 1\n")
    assert ask("g.service") is None
    monkeypatch.setenv("PATH", "/nowhere")
    assert ask("g.service") is None


def test_versions() -> None:
    assert [version_of(text) for text in ("257.9-1", "systemd 252 (252.38)", "262~rc1", "")] == [257, 252, 262, 0]


@pytest.mark.parametrize("keeping", [systemd(nofile=20), systemd(limit=4)._replace(missing=5)])
def test_advice_tells_a_tenant_no_figures_of_all(keeping: Keeping) -> None:
    """The same answers; how many descriptors there are is not said."""
    [everything, told] = [fates("memfd", kept=True, opted_out=False, keeping=one)
                          for one in (keeping, keeping._replace(told=False))]
    assert [fate.answer for fate in everything] == [fate.answer for fate in told]
    assert {fate.advice for fate in everything} - {fate.advice for fate in told} != set()
    assert "a limit of this host is too low: its operator can see which" in {fate.advice for fate in told}
    assert not any("descriptors" in fate.advice for fate in told)
