"""What objects are charged to the account of the client that creates them: their memory, as soon as its size is judged.

Memory that several objects of an account have, a template and its clones, is charged once. What is in memory of the
objects is not noted down, because the processes that have them decide it: it is measured when gmemd itself is to
populate more.
"""

from __future__ import annotations

import os
from functools import partial

from gmemd.authority.ledger import NO_LIMITS, Account, Budget, Charge, Memory, refuse_above, total
from gmemd.backends.base import HostMemoryBackend
from gmemd.changes.change import Change
from gmemd.commands.context import Gmemd
from gmemd.commands.measure import occupied_by
from gmemd.kernel.hugepages import default_size
from gmemd.kernel.kernel import Kernel

_UNITS = (("G", 30), ("M", 20), ("K", 10))


def charge(gmemd: Gmemd, backend: HostMemoryBackend, change: Change, *, aside: bool = False, fd: int = -1) -> None:
    """Charge a checked object, which may have no memory yet, or refuse it.

    aside: private bytes are to be set aside for it. fd: it has this memory, which others may have already.
    """
    budget = change.budget if gmemd.account is None else _budget(gmemd, change)
    if budget is not None:
        account, kernel = budget.account, gmemd.kernel
        backend.account = "" if account.uid == backend.owner[0] or gmemd.account is not None else account.name
        backend.charge = budget.charge(
            backend, _memory_of(kernel, backend),
            _besides(kernel, backend, aside=aside) if aside or backend.aside is not None else NO_LIMITS,
            _charged(account, fd) if fd >= 0 else None)
        change.undo(release, backend)


def _budget(gmemd: Gmemd, change: Change) -> Budget | None:
    """What may be had where an object is: in a made room that is its own, whoever creates something."""
    return change.budget if gmemd.account is None else Budget(gmemd.account, gmemd.account.limits)


def release(backend: HostMemoryBackend) -> None:
    """The object is gone, or will not exist."""
    if backend.charge is not None:
        backend.charge.release()
        backend.charge = None


def grow(gmemd: Gmemd, backend: HostMemoryBackend, change: Change, *, aside: bool = False) -> None:
    """Charge what an object has more than it is charged for, or refuse it; undoing it gives back what it no longer has.

    aside: private bytes are to be set aside for it.
    """
    held = backend.charge
    if held is not None:
        more = _more(gmemd.kernel, backend, held, aside=aside)
        budget = change.budget
        if budget is None or budget.account is not held.account:  # somebody else's object
            budget = Budget(held.account, held.account.limits)
        budget.check(more)
        held.grow(more)
        settle = partial(settle_charge, gmemd, backend)
        change.undo(settle)
        change.done(settle)


def settle_charge(gmemd: Gmemd, backend: HostMemoryBackend) -> None:
    """Charge what an object has now."""
    held = backend.charge
    if held is not None:
        held.grow(_more(gmemd.kernel, backend, held))


def _more(kernel: Kernel, backend: HostMemoryBackend, held: Charge, *, aside: bool = False) -> dict[str, int]:
    """What an object has more than it is charged for."""
    return total(total(_memory_of(kernel, backend), _besides(kernel, backend, aside=aside)), held.amounts, -1)


def _memory_of(kernel: Kernel, backend: HostMemoryBackend) -> dict[str, int]:
    """What the memory of an object counts: what it has, or before that what it will have."""
    huge = _huge_page(backend) if backend.huge_page or backend.properties.get("hugetlb") else 0
    if not huge:
        return {"bytes": backend.memory_size or backend.round_up(kernel.page_size)}
    size = backend.memory_size or backend.round_up(huge)
    unit, shift = next((unit, shift) for unit, shift in _UNITS if huge >> shift)
    return {"bytes": size, f"hugepages-{huge >> shift}{unit}": size}


def _besides(kernel: Kernel, backend: HostMemoryBackend, *, aside: bool = False) -> dict[str, int]:
    """The same of the private bytes that are set aside for it, or are to be."""
    return {"bytes": _memory_of(kernel, backend)["bytes"]} if aside or backend.aside is not None else {}


def _huge_page(backend: HostMemoryBackend) -> int:
    """The bytes of its huge pages; 0: it has none."""
    if not backend.properties.get("hugetlb"):
        return backend.huge_page
    wanted: int = backend.properties.get("hugetlbsize") or 0
    return default_size() if wanted % 2 or not wanted else wanted


# -- after a restart ---------------------------------------------------------------------------------

def charge_again(gmemd: Gmemd) -> None:
    """Charge objects that came back, the oldest first, as they were."""
    known: dict[tuple[Account, tuple[int, int]], Memory] = {}
    kernel = gmemd.kernel
    for backend in gmemd.by_age():
        account = gmemd.of(backend).account
        if account is None:
            if gmemd.ledger is None:
                continue
            account = gmemd.ledger.account(backend.account or f"uid:{backend.owner[0]}")
        if backend.kind == "file":
            backend.huge_page = huge_page_of(kernel, backend.fd)
        memory = Memory(account, _memory_of(kernel, backend))
        if backend.kind != "file":
            memory = known.setdefault((account, _inode(backend.fd)), memory)
        backend.charge = Charge(memory, backend, _besides(kernel, backend))


def _inode(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def huge_page_of(kernel: Kernel, fd: int) -> int:
    """The bytes of a file's huge pages; 0: it has none. May take long."""
    page = kernel.file_page_size(fd)
    return page if page > kernel.page_size else 0


# -- memory that is populated ------------------------------------------------------------------------

async def check_resident(gmemd: Gmemd, change: Change, asked: int) -> None:
    """Charge `asked` bytes to be populated until the change has ended, or refuse them by what is in memory already."""
    budget = _budget(gmemd, change)
    if budget is None or not any("resident" in limits for _, limits in budget.levels):
        return
    change.charge({"resident": asked}, budget, meanwhile=True)
    for account, limits in budget.levels:
        if "resident" in limits:
            under_way = account.used("resident") - asked  # what ends while we measure may not be measured as populated
            refuse_above("resident", limits["resident"], await resident(gmemd, account) + under_way, asked)


async def resident(gmemd: Gmemd, account: Account) -> int:
    """How much of an account's objects is in memory, memory that several of them have once."""
    once = {charge.memory: backend for charge, backend in account.objects.items()}
    return await occupied_by(gmemd.kernel, once.values())


def _charged(account: Account, fd: int) -> Charge | None:
    """The charge of an object of the account that has the memory of a descriptor."""
    wanted = _inode(fd)
    return next((charge for charge, backend in account.objects.items()
                 if backend.kind != "file" and backend.fd >= 0 and _inode(backend.fd) == wanted), None)
