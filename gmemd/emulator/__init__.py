"""gmemd-emulator: what libvirt takes for QEMU: its command line and its QMP around gmemd's memory, and no guest."""
