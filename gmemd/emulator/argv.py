"""QEMU's command line, word by word: which options exist and which of them take a value.

Every option of QEMU's x86 system emulator is known (qemu-options.hx, 7.2 to 11.1), so that none is misread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from gmemd.emulator.values import OFF, ON
from gmemd.errors import QmpError
from gmemd.schema.keyval import Warn, split
from gmemd.schema.sizes import parse_size, parse_uint

_FLAGS = """
    S async-teardown audio-help daemonize enable-kvm enable-sync-profile full-screen h help mem-prealloc no-acpi
    no-fd-bootchk no-hpet no-reboot no-shutdown no-user-config nodefaults nographic only-migratable portrait preconfig
    s singlestep snapshot usb version win2k-hack xen-attach xen-domid-restrict
"""
_VALUES = """
    D L accel acpitable action add-fd append audio audiodev bios blockdev boot cdrom chardev chroot compat cpu d
    debugcon device dfilter display drive dtb dump-vmstate echr fda fdb fsdev fw_cfg gdb global hda hdb hdc hdd icount
    incoming initrd iscsi k kernel loadvm m machine M mem-path mon monitor msg mtdblock name net netdev nic numa object
    objects option-rom overcommit parallel pflash pidfile plugin qmp qmp-pretty readconfig rotate rtc run-with runas
    sandbox sd seed serial set shim smbios smp spice tb-size tpmdev trace usbdevice uuid vga virtfs vnc watchdog
    watchdog-action xen-domid xen-initrd
"""
FLAGS = frozenset(_FLAGS.split())
VALUES = frozenset(_VALUES.split())


def options(argv: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield (name without dashes, value or "") for each option; QmpError in QEMU's words for anything else."""
    words = iter(argv)
    for word in words:
        name = word.removeprefix("-").removeprefix("-")
        if not word.startswith("-") or not name:
            raise QmpError(f"{word}: there are no disks here")
        if name in FLAGS:
            yield name, ""
        elif name in VALUES:
            value = next(words, None)
            if value is None:
                raise QmpError(f"{word}: requires an argument")
            yield name, value
        else:
            raise QmpError(f"{word}: invalid option")


class Pairs:
    """The key=value pairs of one option; errors in them are reported with the option in front."""

    def __init__(self, option: str, text: str, implied: str, known: Iterable[str] | None = None,
                 warn: Warn | None = None) -> None:
        """`known`: the allowed keys; None: any. `warn` gets a line for each key without a value."""
        self.where = f"-{option} {text}"
        self.pairs = split(text, None if warn is None else lambda words: warn(f"{self.where}: warning: {words}"),
                           implied=implied)
        unknown = next((key for key, _ in self.pairs if known is not None and key not in known), None)
        if unknown is not None:
            raise self.error(f"Invalid parameter '{unknown}'")

    def error(self, text: str) -> QmpError:
        """The refusal of this option."""
        return QmpError(f"{self.where}: {text}")

    def __contains__(self, key: str) -> bool:
        return any(name == key for name, _ in self.pairs)

    def all(self, key: str) -> list[str]:
        """Every value of a key, in order."""
        return [value for name, value in self.pairs if name == key]

    def text(self, key: str, default: str = "") -> str:
        """The last value of a key, which is the one that counts."""
        return (self.all(key) or [default])[-1]

    def needed(self, key: str) -> str:
        """The last value of a required key."""
        if key not in self:
            raise self.error(f"Parameter '{key}' is missing")
        return self.text(key)

    def flag(self, key: str, *, default: bool = False) -> bool:
        """on or off."""
        value = self.text(key, "on" if default else "off")
        if value not in ON and value not in OFF:
            raise self.error(f"Parameter '{key}' expects 'on' or 'off'")
        return value in ON

    def number(self, key: str, default: int) -> int:
        """An unsigned integer."""
        if key not in self:
            return default
        value = parse_uint(self.text(key))
        if value is None:
            raise self.error(f"Parameter '{key}' expects a number")
        return value

    def size(self, key: str, default: int, *, unit: int = 1) -> int:
        """Bytes; a plain number counts `unit` bytes."""
        if key not in self:
            return default
        text = self.text(key)
        value = parse_size(text)
        if value is None:
            raise self.error(f"Parameter '{key}' expects a non-negative number below 2^64")
        return value * unit if text.isdigit() else value
