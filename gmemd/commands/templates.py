"""Templates: which objects are their clones, which processes use them, and when one may be deleted.

A clone has the file of its template: device and inode say so, because another object may have the id since.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from gmemd.backends.base import HostMemoryBackend
from gmemd.commands.context import Gmemd
from gmemd.errors import QmpError, os_errors
from gmemd.objects.names import IN_THE_HOUSE

if TYPE_CHECKING:
    from gmemd.processes.holders import Holder

_FEW = 5  # named in a refusal


def clones_of(gmemd: Gmemd, backend: HostMemoryBackend) -> list[HostMemoryBackend]:
    """The clones that have the same memory as this template or clone, without itself, by age."""
    own = backend.template or backend.id
    named = [one for one in gmemd.objects.in_creation_order()
             if one.template and one is not backend and one.template == own]
    named += [one for room in gmemd.rooms.values() for one in room.objects.in_creation_order()
              if one.template == IN_THE_HOUSE + own]
    with os_errors(f"cannot examine '{backend.id}'"):
        return [one for one in named if os.path.sameopenfile(one.fd, backend.fd)]


def find_template(gmemd: Gmemd, name: str) -> HostMemoryBackend:
    """The object that is to be cloned here; QmpError if there is none."""
    if gmemd.tenant is not None and gmemd.sees_all and name.startswith(IN_THE_HOUSE):
        return gmemd.house.objects.find(name.removeprefix(IN_THE_HOUSE))
    return gmemd.objects.find(name)


def home_of_template(gmemd: Gmemd, clone: HostMemoryBackend) -> object:
    """Where the template of a clone is, or was."""
    return gmemd.house.objects if clone.template.startswith(IN_THE_HOUSE) else clone.home


def is_template(backend: HostMemoryBackend) -> bool:
    """Whether clones may have its memory, and are not clones of another."""
    return not backend.blank and not backend.template and backend.frozen


def check_no_clones(gmemd: Gmemd, backend: HostMemoryBackend) -> None:
    """Refuse to delete a template that has clones."""
    clones = clones_of(gmemd, backend)
    if clones:
        raise QmpError(f"object '{backend.id}' is the template of "
                       f"{listed([repr(gmemd.called(one)) for one in clones])}: delete them first, or use 'force'")


async def check_unused(backend: HostMemoryBackend) -> None:
    """Refuse to delete a template that a process has mapped, as the holders of deleted clones have."""
    from gmemd.commands.holders import holders_now  # loaded with the rest

    users = [holder for holder in await holders_now(backend) if holder.mapped]
    if users:
        raise QmpError(f"object '{backend.id}' is a template and mapped by {named(users)}: "
                       "end what uses its clones first, or use 'force'")


def named(holders: list[Holder]) -> str:
    """Processes in a refusal."""
    return listed([f"process {holder.pid} ({holder.comm})" for holder in holders])


def listed(names: list[str]) -> str:
    """Some names, and how many more there are."""
    more = len(names) - _FEW
    return ", ".join(names[:_FEW]) + (f" and {more} more" if more > 0 else "")
