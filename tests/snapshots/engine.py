"""The engine as the daemon uses it: a worker process for each verb, told and heard line by line."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gmemd.errors import QmpError
from gmemd.kernel.program import worker_program

PAGE, BLOCK, MIB = 4096, 64 << 10, 1 << 20
MEMBERS = {"object": {"id": "m", "qom-type": "memory-backend-memfd", "kind": "memfd", "simulated": False,
                      "page-size": PAGE, "properties": {}},
           "consistency": {"via": "idle", "consistent": True}}

Message = dict[str, Any]


class Engine:
    """A worker at work on a verb."""

    def __init__(self, verb: str, spec: Message, fds: list[int], **how: Any) -> None:
        program = worker_program()
        self.process = subprocess.Popen([*program.command, verb, json.dumps(spec)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, pass_fds=(*fds, *program.fds), **how)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._stdin, self._stdout = self.process.stdin, self.process.stdout
        self._stdin.write(program.text)
        self._stdin.flush()

    def tell(self, message: Message) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._stdin.write(json.dumps(message).encode() + b"\n")
            self._stdin.flush()

    def heard(self, *wanted: str) -> Message:
        """The next message with one of these members; QmpError if it fails first."""
        for line in self._stdout:
            message: Message = json.loads(line)
            if "error" in message:
                raise QmpError(message["error"])
            if "errno" in message:
                raise QmpError(os.strerror(message["errno"]))
            if any([name in message for name in wanted]):
                return message
        raise QmpError(f"ended with {self.process.wait()}")

    def end(self) -> int:
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        if not self._stdout.closed:
            self._stdout.read()
            self._stdout.close()
        return self.process.wait()


@contextlib.contextmanager
def opened(path: Path | str) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def running(verb: str, spec: Message, root: Path, fds: list[int], **how: Any) -> Iterator[Engine]:
    with opened(root) as folder:
        engine = Engine(verb, {"root": folder, **spec}, [folder, *fds], **how)
        try:
            yield engine
        finally:
            engine.end()


def memfd(size: int) -> int:
    fd = os.memfd_create("snapshot-test", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


def save(root: Path, name: str, fd: int, size: int = 0, *, offset: int = 0, private: int = -1, parent: str = "",
         dirty: list[list[int]] | None = None, **members: Any) -> Message:
    """Save with one pass; the last message."""
    spec: Message = {"name": name, "size": size or os.fstat(fd).st_size, "id": "m",
                     "memory": {"fd": fd, "offset": offset}}
    if private >= 0:
        spec["private"] = {"fd": private}
    if parent:
        spec["parent"] = parent
    with running("save", spec, root, [fd] if private < 0 else [fd, private]) as engine:
        engine.heard("ready")
        engine.tell({"pass": {"dirty": dirty}})
        engine.heard("passed")
        engine.tell({"finish": {**MEMBERS, **members}})
        return engine.heard("end")


def restore(root: Path, name: str, fd: int, *, offset: int = 0, private: int = -1, clear: bool = False) -> Message:
    spec: Message = {"name": name, "id": "m", "memory": {"fd": fd, "offset": offset}, "clear": clear}
    if private >= 0:
        spec["private"] = {"fd": private}
    with running("restore", spec, root, [fd] if private < 0 else [fd, private]) as engine:
        return engine.heard("end")


def do(verb: str, root: Path, name: str, **spec: Any) -> Message:
    """verify, flatten, cold: a verb on a stored snapshot."""
    with running(verb, {"name": name, **spec}, root, []) as engine:
        return engine.heard("end")


def contents(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def manifest_of(root: Path, name: str) -> Message:
    loaded: Message = json.loads((root / name / "manifest.json").read_text())
    return loaded
