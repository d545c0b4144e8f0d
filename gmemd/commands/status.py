"""Commands that describe memory objects: what they are, how much is in memory, and what they survive."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.pace import Pace
from gmemd.commands.context import Caller, Gmemd
from gmemd.commands.listing import SHORT, in_turns
from gmemd.commands.measure import are_quick, item_of, kind_of, measured
from gmemd.errors import QmpError
from gmemd.kernel.uapi import F_SEAL_EXEC, F_SEAL_WRITE
from gmemd.memory.usage import occupied
from gmemd.objects.survival import fates
from gmemd.posix import boottime
from gmemd.qmp.encode import encode
from gmemd.qmp.rows import Form

if TYPE_CHECKING:
    from gmemd.commands.outlook import Outlook

_EMPTY: Final[tuple[int | None, ...]] = (0,)  # bytes in memory of what has none
_BATCH: Final = 100  # objects that are measured and described at a time


def query_memdev(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
    if gmemd.rooms:
        return in_turns((backend.memdev_as(backend.name) for backend in gmemd.seen()), Pace())
    if len(gmemd.objects) > SHORT:
        return in_turns((backend.memdev for backend in gmemd.objects), Pace())
    return b"[%b]" % b", ".join([backend.memdev for backend in gmemd.objects])


def query_memdev_status(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> Any:
    if arguments["survival"] and gmemd.outlook.must_look():
        return _status_after_a_look(gmemd, gmemd.outlook, arguments)
    return _status(gmemd, arguments)


async def _status_after_a_look(gmemd: Gmemd, outlook: Outlook, arguments: dict[str, Any]) -> Any:
    """The same, once systemd has reported what it keeps now."""
    await outlook.look()
    status = _status(gmemd, arguments)
    return status if isinstance(status, list) else await status


def _status(gmemd: Gmemd, arguments: dict[str, Any]) -> Any:
    wanted = arguments.get("id")
    backends = gmemd.seen() if wanted is None else [gmemd.objects.find(wanted)]
    if len(backends) > _BATCH or not are_quick(backends):
        return _status_in_turns(gmemd, backends, arguments)
    describe = describe_status if arguments["survival"] else _describe
    return [describe(gmemd, backend, occupied(gmemd.kernel, item_of(backend))) for backend in backends]


async def _status_in_turns(gmemd: Gmemd, backends: list[HostMemoryBackend], arguments: dict[str, Any]) -> Any:
    """The same without holding up others; objects deleted meanwhile are left out."""
    rows = _Rows(gmemd, survival=arguments["survival"])
    texts: list[bytes] = []
    async for found in measured(gmemd, backends, partial(occupied, gmemd.kernel), batch=_BATCH, empty=_EMPTY):
        rows.now = boottime.now()
        texts.append(b", ".join([rows.write(backend, resident) for backend, resident in found]))
    if "id" in arguments and not any(texts):
        raise QmpError(f"object '{arguments['id']}' not found")
    return await in_turns(filter(None, texts), Pace())


class _Rows:
    """Writes MemdevStatus: most objects differ from others only in figures, and survive the same."""

    def __init__(self, gmemd: Gmemd, *, survival: bool) -> None:
        """`survival`: also write what they survive."""
        self.now = 0.0  # seconds since boot
        self._gmemd = gmemd
        self._describe = describe_status if survival else _describe
        self._says_survival = survival
        self._survival: dict[Any, bytes] = {}  # most of the output
        self._forms: dict[Any, Form] = {}

    def write(self, backend: HostMemoryBackend, resident: int | None) -> bytes:
        """The row of an object, of which so many bytes are in memory (None: unknown), as JSON."""
        gmemd = self._gmemd
        survives = (_survival_kind(gmemd, backend), backend.record is None, _freezes(gmemd, backend)) \
            if self._says_survival else None
        if resident is None or not _is_plain(gmemd, backend):
            return self._write_special(backend, resident, (survives, bool(backend.template)))
        kind = (backend.qom_type, backend.kind, survives)
        form = self._forms.get(kind)
        if form is None:
            form = self._forms[kind] = Form({**self._describe(gmemd, backend, resident), **_VARYING})
        uid, pid = backend.owner
        return form.write(encode(gmemd.called(backend)), backend.memory_size, backend.offset, uid, pid,
                          int(self.now - backend.made), backend.handed_out, backend.generation, resident)

    def _write_special(self, backend: HostMemoryBackend, resident: int | None, survives: Any) -> bytes:
        """The same for an object with members that others do not have."""
        if not self._says_survival:
            return encode(_describe(self._gmemd, backend, resident))
        if survives not in self._survival:
            self._survival[survives] = b'"survival": ' + encode(describe_survival(self._gmemd, backend))
        row = encode({**_describe(self._gmemd, backend, resident), "survival": []})
        return row.replace(b'"survival": []', self._survival[survives])  # in a string its quotes are escaped


# The members that differ between plain objects, in the order of MemdevStatus.
_VARYING: Final = {"id": bytes, "size": int, "offset": int, "owner": {"uid": int, "pid": int}, "age": int,
                   "handed-out": int, "generation": int, "resident": int}


def _is_plain(gmemd: Gmemd, backend: HostMemoryBackend) -> bool:
    """Whether MemdevStatus has no members for it that others do not have."""
    return not (backend.template or backend.runner is not None or backend.frozen
                or gmemd.of(backend).snapshots.checkpoints(backend.id))


def describe_memory(gmemd: Gmemd, backend: HostMemoryBackend) -> dict[str, Any]:
    """The members of MemdevFd for an object."""
    info: dict[str, Any] = {"size": backend.memory_size, "offset": backend.offset, "kind": backend.kind,
                            "kernel": gmemd.kernel.name}
    if backend.guest_memfd_flags is not None:
        info["guest-memfd-flags"] = backend.guest_memfd_flags
    if backend.frozen:
        info["frozen"] = True
    return info


def describe_status(gmemd: Gmemd, backend: HostMemoryBackend, resident: int | None) -> dict[str, Any]:
    """The members of MemdevStatus; `resident` is the measured bytes, None: unknown."""
    return {**_describe(gmemd, backend, resident), "survival": describe_survival(gmemd, backend)}


def _describe(gmemd: Gmemd, backend: HostMemoryBackend, resident: int | None) -> dict[str, Any]:
    uid, pid = backend.owner
    room, name = gmemd.of(backend), gmemd.called(backend)
    status = {"id": name, "qom-type": backend.qom_type, "kind": backend.kind, "kernel": gmemd.kernel.name,
              "kernel-reason": gmemd.kernel.why, "size": backend.memory_size, "offset": backend.offset,
              "owner": {"uid": uid, "pid": pid}, "age": backend.age, "handed-out": backend.handed_out,
              "generation": backend.generation}
    if resident is not None:
        status["resident"] = resident
    if backend.frozen:
        status["frozen"] = True
    if backend.template:
        status["template"] = room.named(backend.template)
    if checkpoints := room.snapshots.checkpoints(backend.id):
        status["checkpoints"] = checkpoints
    if backend.runner is not None:
        status["runner"] = {"uid": backend.runner.uid, "pid": backend.runner.pid}
    return status


def describe_survival(gmemd: Gmemd, backend: HostMemoryBackend) -> list[dict[str, Any]]:
    """The MemdevSurvival of an object."""
    kept = backend.record is not None
    keeping = gmemd.outlook.keeping()._replace(told=gmemd.sees_all)
    return [{"event": fate.event, "survives": fate.survives, "answer": fate.answer,
             **({"advice": fate.advice} if fate.advice else {})}
            for fate in fates(_survival_kind(gmemd, backend), kept=kept, opted_out=gmemd.custody.keeps and not kept,
                              keeping=keeping, clone=bool(backend.template),
                              freezes=_freezes(gmemd, backend))]


def _survival_kind(gmemd: Gmemd, backend: HostMemoryBackend) -> str:
    simulated = backend.kind == "guest-memfd" and gmemd.kernel.is_simulated(backend.fd)
    return "stand-in" if simulated else kind_of(backend)


def _freezes(gmemd: Gmemd, backend: HostMemoryBackend) -> bool:
    """Whether a live update would bring it back sealed against writing, which it is not now."""
    if not gmemd.outlook.live_update or backend.fd < 0 or backend.kind == "file":
        return False
    return ((gmemd.kernel.seals(backend.fd) or 0) & (F_SEAL_EXEC | F_SEAL_WRITE)) == F_SEAL_EXEC


def query_memory_size_summary(gmemd: Gmemd, caller: Caller, arguments: dict[str, Any]) -> dict[str, Any]:
    # No machine, so no RAM of a machine: the objects are in query-memdev.
    return {"base-memory": 0, "plugged-memory": 0}
