"""gmemd-emulator, QEMU to libvirt: its command line and its QMP around gmemd's memory, without a guest."""
