"""gmemctl against a running gmemd: the verbs, what they print, and their exit status."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from gmemd.cli.gmemctl import SYSTEM_SOCKET, VERBS, main, socket_path
from gmemd.client.client import Client
from tests.cli.conftest import Gmemctl
from tests.daemon import Daemon, Server
from tests.patience import PATIENCE
from tests.programs import gmemctl as command_line
from tests.programs import needs

MEMFD = "memory-backend-memfd"

# -- ls, show, create, rm, get-fd


def test_ls(gmemctl: Gmemctl, client: Client) -> None:
    """People get a table by id with sizes in units, programs the exact values."""
    assert gmemctl("ls").out.split() == ["ID", "TYPE", "KIND", "KERNEL", "SIZE", "RESIDENT", "OWNER", "AGE", "OUT"]
    assert json.loads(gmemctl("ls", "-o", "json").out) == []
    client.execute("object-add", {"qom-type": MEMFD, "id": "m1", "size": 3 << 29})
    client.execute("object-add", {"qom-type": "memory-backend-ram", "id": "m0", "size": 4096})
    lines = gmemctl("ls").out.splitlines()[1:]
    assert [line.split()[:2] for line in lines] == [["m0", "ram"], ["m1", "memfd"]]
    assert "1.5 GiB" in lines[1]
    assert f"root/{os.getpid()}" in lines[1]
    found = json.loads(gmemctl("-o", "json", "ls").out)
    assert sorted((status["id"], status["size"]) for status in found) == [("m0", 4096), ("m1", 3 << 29)]


def test_ls_finds_and_sorts(gmemctl: Gmemctl, client: Client) -> None:
    """By pattern, owner and type; the least first, by id unless asked; what matches nothing is said."""
    for name, kind, size in (("m2", "memfd", 4096), ("m1", "memfd", 8192), ("r0", "ram", 4096)):
        client.execute("object-add", {"qom-type": f"memory-backend-{kind}", "id": name, "size": size})

    def listed(*words: str) -> list[str]:
        names = gmemctl("ls", "-o", "name", *words).out.split()
        assert [status["id"] for status in json.loads(gmemctl("ls", "-o", "json", *words).out)] == names
        assert [line.split()[0] for line in gmemctl("ls", *words).out.splitlines()[1:]] == names
        return names

    assert listed() == ["m1", "m2", "r0"]
    assert listed("-r") == ["r0", "m2", "m1"]
    assert listed("--sort", "size") == ["m2", "r0", "m1"]
    assert listed("--sort", "size", "--reverse") == ["m1", "r0", "m2"]
    assert listed("m*", "--sort=owner") == ["m1", "m2"]
    assert listed("--type", "ram") == listed("--type", "memory-backend-ram") == ["r0"]
    assert listed("--owner", "root") == listed("--owner", str(os.getuid())) == ["m1", "m2", "r0"]
    assert listed("--owner", "nobody") == []
    nothing = "gmemctl: no object matches; types here: memfd, ram; owners: root\n"
    for words in (["--type", "rum"], ["--owner", ""], ["--type", "", "-o", "name"]):  # as of an unset variable
        assert gmemctl("ls", *words).err == nothing
    wide = gmemctl("ls", "r0", "-o", "wide").out.splitlines()
    assert [header for header in wide[0].split() if header not in gmemctl("ls").out] == [
        "OFFSET", "SHARE", "PREALLOC", "POLICY", "NODES", "SURVIVES"]
    assert wide[1].split()[-6:] == ["B", "off", "off", "default", "-", "vmm-crash,vmm-replaced,client-disconnect"]
    assert gmemctl("ls", "m1", "nope").status == 1
    assert gmemctl("ls", "nope") == (1, "", "gmemctl: object 'nope' not found\n  hint: the objects here: m1, m2, r0\n")


def test_create_show_rm(gmemctl: Gmemctl) -> None:
    """create takes -object's syntax and JSON; show tells all of an object; rm removes; silence is success."""
    made = gmemctl("create", f"{MEMFD},id=m0,size=1M,share=on", f'{{"qom-type":"{MEMFD}","id":"m1","size":4096}}')
    assert made == (0, "", "")
    lines = [line.split(maxsplit=1) for line in gmemctl("show", "m0").out.splitlines()]
    assert lines[0] == ["id", "m0"]
    assert lines.count(["size", "1 MiB (1048576)"]) == 2
    assert ["policy", "default"] in lines
    exact = json.loads(gmemctl("show", "m0", "-o", "json").out)
    assert (exact["status"]["size"], exact["properties"]["size"]) == (1 << 20, 1 << 20)
    assert exact["properties"]["seal"] is True
    assert gmemctl("rm", "m0", "m1") == (0, "", "")
    assert json.loads(gmemctl("ls", "-o", "json").out) == []


def test_create_help(gmemctl: Gmemctl) -> None:
    """TYPE,help lists a type's properties, help what all have, as QEMU's -object."""
    assert "memory-backend-memfd" in gmemctl("create", "help").out
    listed = gmemctl("create", f"{MEMFD},help").out
    assert "hugetlb " in listed
    assert "mem-path" not in listed


def test_rm_goes_on(gmemctl: Gmemctl) -> None:
    """An object that is not there does not keep the others."""
    gmemctl("create", f"{MEMFD},id=m0,size=1M")
    status, _, err = gmemctl("rm", "nope", "m0")
    assert status == 1
    assert err.startswith("gmemctl: object 'nope' not found\n")
    assert json.loads(gmemctl("ls", "-o", "json").out) == []


def test_get_fd(gmemctl: Gmemctl, client: Client) -> None:
    """get-fd shows the reply and what the descriptor is; every reply names the same inode."""
    gmemctl("create", f"{MEMFD},id=m0,size=1M")
    found = json.loads(gmemctl("get-fd", "m0", "-o", "json").out)
    _, [fd] = client.execute_fds("memdev-get-fd", {"id": "m0"})
    assert found["inode"] == os.fstat(fd).st_ino
    os.close(fd)
    assert (found["size"], found["kind"]) == (1 << 20, "memfd")
    assert "1 MiB (1048576)" in gmemctl("get-fd", "m0").out


# -- call, qmp, events


def test_call(gmemctl: Gmemctl) -> None:
    """Any command runs with key=value; an empty result prints nothing."""
    assert gmemctl("call", "object-add", f"qom-type={MEMFD}", "id=m0", "size=1M", "merge=off") == (0, "", "")
    assert gmemctl("call", "qom-get", "path=m0", "property=size").out == "1048576\n"
    assert gmemctl("call", "query-memdev").out.splitlines()[1].split()[:4] == ["m0", "1", "MiB", "false"]
    assert json.loads(gmemctl("call", "query-memdev", "-o", "json").out)[0]["merge"] is False
    assert gmemctl("call", "query-kvm").out.splitlines()[0].split() == ["enabled", "false"]


def test_call_lists(gmemctl: Gmemctl) -> None:
    """Without a command all are listed; 'help' lists a command's arguments."""
    assert "object-add" in gmemctl("call").out.split()
    assert gmemctl("call", "object-del", "help").out.splitlines()[1].split() == ["id", "needed", "str"]
    assert gmemctl("call", "query-kvm", "help").out == "query-kvm takes no arguments\n"
    assert "depending on qom-type" in gmemctl("call", "object-add", "help").out
    assert gmemctl("call", "nope", "help").err.startswith("gmemctl: The command nope has not been found\n")


def test_call_sends_and_receives_fds(gmemctl: Gmemctl, tmp_path: Path) -> None:
    """--fd sends one of our descriptors; one that comes back is reported and closed."""
    before = len(os.listdir("/proc/self/fd"))
    with (tmp_path / "file").open("w") as file:
        number = str(file.fileno())
        status, out, _ = gmemctl("call", "add-fd", "--fd", number, "fdset-id=7", "opaque=x", "-o", "json")
        assert (status, json.loads(out)["fdset-id"]) == (0, 7)
    assert gmemctl("call", "remove-fd", "fdset-id=7").status == 0
    assert gmemctl("call", "add-fd", "--fd", number)[:2] == (2, "")
    gmemctl("create", f"{MEMFD},id=m0,size=1M")
    assert "received a descriptor of /memfd:" in gmemctl("call", "memdev-get-fd", "id=m0").err
    assert len(os.listdir("/proc/self/fd")) == before


def test_qmp(gmemctl: Gmemctl) -> None:
    """Raw messages go as they are, and the replies are printed whole, one a line."""
    status, out, _ = gmemctl("qmp", "{'execute':'query-name','id':[1]} {\"execute\":\"x\"} 12")
    assert status == 1
    assert out.splitlines() == [
        '{"return": {}, "id": [1]}',
        '{"error": {"class": "CommandNotFound", "desc": "The command x has not been found"}}',
        '{"error": {"class": "GenericError", "desc": "QMP input must be a JSON object"}}',
    ]
    assert gmemctl("qmp", '{"execute":"query-name"}').status == 0


@pytest.mark.parametrize("text", ["{", '{"execute":', '{"a":"b}', "[1,"])
def test_qmp_incomplete(gmemctl: Gmemctl, text: str) -> None:
    """What would never be answered is not sent."""
    assert gmemctl("qmp", text) == (2, "", "gmemctl: the JSON is not complete; nothing was sent\n")


def test_qmp_reads_standard_input(shared: Daemon) -> None:
    """Without text, or with -, raw messages come from standard input."""
    for words in ([], ["-"]):
        done = subprocess.run(
            command_line("--socket", str(shared.sock), "qmp", *words),
            input='{"execute":"query-name"}\n{"execute":"query-uuid"}',
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
        )
        assert done.stdout.splitlines()[0] == '{"return": {}}'
        assert len(done.stdout.splitlines()) == 2


STAMP = '"timestamp": {"seconds": 0, "microseconds": 5}'
EVENTS = f'{{{STAMP}, "event": "OTHER"}}\r\n{{{STAMP}, "event": "E", "data": {{"a": "b", "c": 1}}}}\r\n'


@contextmanager
def speaker(path: Path, text: str) -> Iterator[str]:
    """A server that negotiates, says the text, and then only listens; yields its path."""
    greeting = '{"QMP": {"version": {}, "capabilities": []}}\r\n{"return": {}, "id": 1}\r\n'

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall((greeting + text).encode())
            while connection.recv(1000):
                pass

    with socket.socket(socket.AF_UNIX) as listener:
        listener.settimeout(PATIENCE)
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        yield str(path)
        thread.join()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["E", "-n", "1"], ".000005  E  a=b  c=1\n"),
        (["-o", "json", "--for", "0.01", "E"], '"data": {"a": "b", "c": 1}}\n'),
        (["-f", "-n2"], "E  a=b  c=1\n"),
        (["-o", "yaml", "E", "-n1"], "event: E\ndata:\n  a: b\n  c: 1\n"),
    ],
)
def test_events(tmp_path: Path, capfd: pytest.CaptureFixture[str], words: list[str], expected: str) -> None:
    """events prints what comes, by name, as many as wanted, as lines or JSON."""
    with speaker(tmp_path / "s", EVENTS) as path:
        assert main(["--socket", path, "events", *words]) == 0
    assert capfd.readouterr().out.endswith(expected)


STATUS = ('{"id": "%s", "qom-type": "memory-backend-file", "kind": "file", "kernel": "kvm", "kernel-reason": "", '
          '"size": 4096, "offset": 0, %s "owner": {"uid": 0, "pid": 1}, "age": 1, "handed-out": 0, "survival": []}')


@pytest.mark.parametrize(("words", "shown"), [
    (["ls"], ["a file file kvm 4 KiB ? root/1 1s 0", "b file file kvm 4 KiB 1 KiB root/1 1s 0"]),
    (["top", "-n", "1"], ["2 objects, 1 KiB of 8 KiB in memory, 1 unknown", "b file 4 KiB 1 KiB 25% 0",
                          "a file 4 KiB ? ? 0"]),
])
def test_what_is_not_known_is_a_question_mark(tmp_path: Path, capfd: pytest.CaptureFixture[str], words: list[str],
                                              shown: list[str]) -> None:
    """An object whose residency the kernel does not tell is listed with the others."""
    statuses = ", ".join([STATUS % ("a", ""), STATUS % ("b", '"resident": 1024,')])
    with speaker(tmp_path / "s", f'{{"return": [{statuses}], "id": 2}}\r\n{{"return": [], "id": 3}}\r\n') as path:
        assert main(["--socket", path, *words]) == 0
    lines = [" ".join(line.split()) for line in capfd.readouterr().out.splitlines()]
    assert [line for line in lines if not line.startswith("ID")] == shown


# -- help, output


def test_help(capfd: pytest.CaptureFixture[str]) -> None:
    """help lists the verbs, help VERB is what VERB --help is; neither needs a server."""
    assert main(["help"]) == 0
    listed = capfd.readouterr().out
    assert {word for verb in VERBS for word in verb.split()} <= set(listed.replace(",", " ").split())
    assert main(["help", "rm"]) == 0
    said = capfd.readouterr().out
    assert "gmemctl rm 'vm0*' --dry-run" in said
    with pytest.raises(SystemExit):
        main(["rm", "--help"])
    assert capfd.readouterr().out == said
    assert main(["help", "shwo"]) == 2
    assert capfd.readouterr().err == ("gmemctl: unknown verb 'shwo'\n  hint: did you mean 'show'?\n"
                                      "  hint: 'gmemctl call shwo help' describes a command of the server\n")


def test_help_fits_the_terminal(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A serial console, whose size is 0 by 0, counts as 80 columns wide."""
    widths = []
    for columns in (0, 60):
        monkeypatch.setattr("os.get_terminal_size", lambda columns=columns: os.terminal_size((columns, 0)))
        assert main(["help", "ls"]) == 0
        widths.append(max(map(len, capfd.readouterr().out.splitlines())))
    assert 60 < widths[0] <= 78
    assert widths[1] <= 58


def test_yaml(gmemctl: Gmemctl) -> None:
    """-o yaml says what -o json says; -o name only ids."""
    gmemctl("create", f"{MEMFD},id=m0,size=1M", f"{MEMFD},id=m1,size=1M")
    for words in (["ls"], ["show", "m0"], ["survive"], ["call", "query-memdev"], ["create", f"{MEMFD},id=x,size=1M",
                                                                                  "--dry-run"]):
        said = yaml.safe_load(gmemctl(*words, "-o", "yaml").out)
        exact = json.loads(gmemctl(*words, "-o", "json").out)
        assert json.loads(re.sub(r'"age": \d+', '"age": 0', json.dumps(said))) == json.loads(
            re.sub(r'"age": \d+', '"age": 0', json.dumps(exact)))
    assert gmemctl("survive", "-o", "name").out == "m0\nm1\n"
    assert gmemctl("jobs", "-o", "name") == (0, "", "")
    assert gmemctl("call", "query-kvm", "-o", "name").status == 2


# -- exec


def run(daemon: Daemon, *words: str) -> subprocess.CompletedProcess[str]:
    argv = command_line("--socket", str(daemon.sock), *words)
    return subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE, check=False)


def test_exec_hands_over_memory(gmemctl: Gmemctl, shared: Daemon) -> None:
    """What a command writes through {ID} or {ID.fd} is there for the next one."""
    gmemctl("create", f"{MEMFD},id=m0,size=64K", f"{MEMFD},id=m1,size=1M")
    write = run(shared, "exec", "m0", "m1", "--", "sh", "-c", "printf abc 1<>{m0}; printf de >&{m1.fd}; exit 7")
    assert (write.returncode, write.stderr) == (7, "")
    read = run(shared, "exec", "m1", "m0", "--", "sh", "-c", "head -c3 {m0}; head -c2 {m1}; echo {m0.size} {x}")
    assert (read.returncode, read.stdout) == (0, "abcde65536 {x}\n")


def test_exec_says_where_a_part_begins(gmemctl: Gmemctl, shared: Daemon, tmp_path: Path) -> None:
    """{ID.offset} is where in its file an object begins; who is not told the command's offset is reminded of it."""
    file = tmp_path / "two"
    file.write_bytes(b"A" * 65536 + b"B" * 65536)
    gmemctl("create", f"memory-backend-file,id=m0,size=64K,mem-path={file},share=on",
            f"memory-backend-file,id=m1,size=64K,offset=64K,mem-path={file},share=on")
    copy = "dd if={m1} bs=1 count=2 skip={m1.offset} status=none; echo {m0.offset}"
    told = run(shared, "exec", "m0", "m1", "--", "sh", "-c", copy)
    assert (told.stdout, told.stderr) == ("BB0\n", "")
    reminded = run(shared, "exec", "m0", "m1", "--", "head", "-c1", "{m1}")
    assert (reminded.stdout, reminded.stderr) == (
        "A", "gmemctl: 'm1' begins at byte 65536 of its file: pass the command {m1.offset}\n")
    shown = gmemctl("get-fd", "m1", "-o", "json")
    assert (json.loads(shown.out)["size"], json.loads(shown.out)["offset"]) == (65536, 65536)


def test_exec_under_wanted_numbers(gmemctl: Gmemctl, shared: Daemon) -> None:
    """ID=N puts a descriptor there, also when others are in the way; nothing else is inherited."""
    gmemctl("create", *(f"{MEMFD},id=m{number},size={number}M" for number in (1, 2, 3)))
    script = "import os, sys; print(os.listdir('/proc/self/fd'), [os.fstat(n).st_size >> 20 for n in (3, 4, 9)])"
    done = run(shared, "exec", "m1=4", "m2=3", "m3=9", "--", sys.executable, "-c", script)
    assert done.stdout == "['0', '1', '2', '3', '4', '5', '9'] [2, 1, 3]\n"  # 5: the listing itself


def test_exec_is_the_command(gmemctl: Gmemctl, shared: Daemon) -> None:
    """The command takes our place: our pid, default signals, and its end by a signal is ours."""
    gmemctl("create", f"{MEMFD},id=m0,size=1M")
    script = "grep SigIgn /proc/self/status; kill -TERM $$"
    with subprocess.Popen(
        command_line("--socket", str(shared.sock), "exec", "m0", "--", "sh", "-c", f"echo $$; {script}"),
        stdout=subprocess.PIPE,
        text=True,
        restore_signals=True,
    ) as process:
        out, _ = process.communicate(timeout=PATIENCE)
        lines = out.split()
        assert lines[0] == str(process.pid)
        assert int(lines[2], 16) & (1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1) == 0
        assert process.returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["m0", "--", "/nonexistent/x"], 127, "/nonexistent/x: No such file or directory"),
        (["m0", "--", "/etc"], 126, "/etc: Permission denied"),
        (["nope", "--", "true"], 125, "object 'nope' not found"),
        (["m0"], 2, "exec needs a command: gmemctl exec ID -- COMMAND"),
        (["m0", "--"], 2, "exec needs a command: gmemctl exec ID -- COMMAND"),
        (["m0", "m0", "--", "true"], 2, "exec: an object is named twice"),
        (["m0=x", "--", "true"], 2, "exec: 'm0=x' is not of the form ID or ID=N"),
        (["m0=7", "m1=7", "--", "true"], 2, "exec: two objects cannot have one descriptor number"),
        (["m0=99999999999", "--", "true"], 2, "exec: 'm0=99999999999': "),
    ],
)
def test_exec_that_fails(gmemctl: Gmemctl, shared: Daemon, words: list[str], status: int, text: str) -> None:
    """Statuses as env(1) has them, so that the command's own can be told apart."""
    gmemctl("create", f"{MEMFD},id=m0,size=1M")
    done = run(shared, "exec", *words)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith(f"gmemctl: {text}")


# -- connections and exit status


def test_socket_path() -> None:
    """--socket, then GMEMD_SOCKET, then root's place, then the user's own; unix: may stand before it."""
    assert socket_path("/a", {"GMEMD_SOCKET": "/b"}, 7) == "/a"
    assert socket_path(None, {"GMEMD_SOCKET": "unix:/b"}, 0) == "/b"
    assert socket_path(None, {}, 0) == SYSTEM_SOCKET
    if not os.path.exists(SYSTEM_SOCKET):
        assert socket_path(None, {"XDG_RUNTIME_DIR": "/r"}, 7) == "/r/gmemd/qmp.sock"
        assert socket_path(None, {}, 7) == "/run/user/7/gmemd/qmp.sock"


def test_no_connection(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Without a server the status is 3, and 125 for exec."""
    assert main(["ls", "--socket", str(tmp_path / "none")]) == 3
    assert capfd.readouterr().err.startswith(f"gmemctl: cannot connect to {tmp_path}/none: No such file")
    assert main(["--socket", "/" + "x" * 200, "exec", "m0", "--", "true"]) == 125
    assert "AF_UNIX path too long" in capfd.readouterr().err


def test_no_answer_in_time(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """--timeout bounds the wait for each answer: status 4."""
    with speaker(tmp_path / "s", "") as path:
        assert main(["--socket", path, "ls", "--timeout", "0.01"]) == 4
    assert capfd.readouterr().err == "gmemctl: no answer in time\n"


@pytest.mark.parametrize("words", [
    [], ["bogus"], ["doctor", "x"], ["rm"], ["rm", "x", "--all"], ["help", "x"], ["ls", "-o", "xml"],
    ["call", "x", "-z"], ["convert", "m0"], ["convert", "m0", "hidden"], ["convert", "private"],
    ["create", "-o", "name"],
])
def test_usage(gmemctl: Gmemctl, words: list[str]) -> None:
    """A wrong command line is 2, and nothing is sent."""
    assert gmemctl(*words).status == 2


def test_reader_of_output_goes(shared: Daemon) -> None:
    """Output that nobody reads ends gmemctl, without a word."""
    reader, writer = os.pipe()
    os.close(reader)
    words = command_line("--socket", str(shared.sock), "call")
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, timeout=PATIENCE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.e2e
@needs("qemu-system-x86_64")
def test_against_qemu(capfd: pytest.CaptureFixture[str]) -> None:
    """What needs no command of gmemd's own works with a real QEMU, hints included."""
    machine = ["-machine", "none", "-nodefaults", "-display", "none", "-S"]
    with Server(["qemu-system-x86_64", *machine, "-qmp", "{address},server=on,wait=off"]) as qemu:
        ctl = ["--socket", str(qemu.sock)]
        assert main([*ctl, "create", "memory-backend-ram,id=m0,size=1M"]) == 0
        assert main([*ctl, "call", "query-memdev", "-o", "json"]) == 0
        assert json.loads(capfd.readouterr().out)[0]["size"] == 1 << 20
        words = ["chardev-add", "id=c0", "backend.type=ringbuf", "backend.data.size=4K"]
        assert main([*ctl, "call", *words]) == 0
        assert main([*ctl, "call", "query-memdew"]) == 1
        assert "hint: did you mean 'query-memdev'?" in capfd.readouterr().err
        assert main([*ctl, "rm", "m1"]) == 1
        assert "hint: the objects here: m0" in capfd.readouterr().err
        assert main([*ctl, "rm", "m0"]) == 0
        assert main([*ctl, "call", "quit"]) == 0
