"""One machine under QEMU without acceleration, from its kernel's start to the exit status of its command.

TCG emulates AMD's SVM with nested paging, so the kernel inside has a /dev/kvm on any host.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from tests.kernel.lab import root
from tests.kernel.lab.initramfs import archive
from tests.kernel.lab.kernels import Kernel
from tests.kernel.lab.packages import CACHE

NO_BOOT = 125
TIMEOUT = 124

# what EPYC has and TCG has not is left out, or QEMU would warn of each
_CPU = "EPYC,+svm,-xsaves,-xsavec,-rdseed,-sha-ni,-fxsr-opt,-misalignsse,-3dnowprefetch,-osvw,-topoext,-nrip-save"
_APPEND = "console=ttyS0 panic=-1 quiet loglevel=4 mitigations=off random.trust_cpu=on tsc=reliable root=/dev/vda rw"


@dataclass(frozen=True)
class Machine:
    """A machine for one command. What it writes to its disk is thrown away."""

    kernel: Kernel
    memory: int = 3072  # MiB
    nodes: int = 1
    append: str = ""  # to the kernel's command line
    timeout: float = 3600  # seconds
    systemd: bool = False  # boots it, and the command is a service, started again after a kexec

    def run(self, command: str, output: BinaryIO) -> int:
        """Run a command of /bin/sh in the tree, copy its output; its exit status, or NO_BOOT, or TIMEOUT."""
        with TemporaryDirectory(dir=CACHE) as scratch:
            folder = Path(scratch)
            (folder / "initrd").write_bytes(archive(self.kernel, command))
            for name in ("console", "output", "status"):
                (folder / name).touch()
            process = subprocess.Popen(self._qemu(folder), stdin=subprocess.DEVNULL)
            try:
                status = self._follow(process, folder, output)
            finally:
                process.kill()
                process.wait()
            if status in (NO_BOOT, TIMEOUT):
                sys.stderr.write((folder / "console").read_text(errors="replace")[-6000:])
        return status

    def _follow(self, process: subprocess.Popen[bytes], folder: Path, output: BinaryIO) -> int:
        end = time.monotonic() + self.timeout
        with (folder / "output").open("rb") as said:
            while True:
                over = process.poll() is not None
                status = (folder / "status").read_text()
                output.write(said.read())
                output.flush()
                if status.endswith("\n"):
                    return int(status)
                if over:
                    return NO_BOOT
                if time.monotonic() > end:
                    return TIMEOUT
                time.sleep(0.2)

    def _qemu(self, folder: Path) -> list[str]:
        words = ["qemu-system-x86_64", "-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", _CPU, "-smp", "2",
                 "-m", str(self.memory), "-display", "none", "-nodefaults", "-no-user-config", "-no-reboot",
                 "-kernel", str(self.kernel.image), "-initrd", f"{folder}/initrd",
                 "-append", f"{_APPEND} {'lab.systemd ' if self.systemd else ''}{self.append}",
                 "-drive", f"file={root.image()},if=none,id=disk,format=raw,snapshot=on",
                 "-device", "virtio-blk-pci,drive=disk"]
        for name in ("console", "output", "status"):
            words += ["-serial", f"file:{folder}/{name}"]
        for node in range(self.nodes if self.nodes > 1 else 0):
            words += ["-object", f"memory-backend-ram,id=m{node},size={self.memory // self.nodes}M",
                      "-numa", f"node,nodeid={node},memdev=m{node}" + (f",cpus={node}" if node < 2 else "")]
        return words
