#!/bin/sh
# QEMU's migrate reads all of the guest's RAM, even pages that were never touched; in shared memory that allocates them.
. "$(dirname "$0")/common"
make_tree trixie qemu-system-x86
chroot "$tree" qemu-system-x86_64 --version | head -n 1

save() { # on|off: save the state of a guest that has not run yet; its 256 MiB of RAM are a file in a tmpfs
    echo "x-ignore-shared $1:"
    unshare --mount sh -euc '
        mount -t tmpfs tmpfs "$1/run"
        printf "%s\n" "migrate_set_capability x-ignore-shared $2" "migrate \"exec:cat >/dev/null\"" "info migrate" quit |
            chroot "$1" qemu-system-x86_64 -accel tcg -nodefaults -display none -monitor stdio -S -m 256M \
                -object memory-backend-file,id=ram,size=256M,share=on,mem-path=/run/ram \
                -machine pc,memory-backend=ram | grep "^Migration status"
        echo "$(du -m "$1/run/ram" | cut -f 1) MiB resident"
    ' sh "$tree" "$1"
}
save off | tee "$temporary/off"
save on | tee "$temporary/on"
grep -q '^256 MiB' "$temporary/off" && grep -q '^[0-9] MiB' "$temporary/on"
