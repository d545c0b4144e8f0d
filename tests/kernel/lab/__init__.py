"""The lab: other Linux kernels in an emulated machine, gmemd of this tree in them. script/kernel-lab runs it.

    packages   fetch and unpack Debian packages, of all releases
    kernels    which kernels there are; the kernel with live update, built here
    root       the disk: Debian sid with systemd, Python and what gmemd needs
    initramfs  what boots first: busybox, modules, this tree
    machine    QEMU, from the kernel's start to the exit status of the command
    ladder     runs inside: objects, a kexec, the objects again
"""
