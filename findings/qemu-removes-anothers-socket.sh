#!/bin/sh
# A QEMU that ends removes the path of its QMP socket, even if another process listens there by then.
. "$(dirname "$0")/common"
make_tree trixie qemu-system-x86
chroot "$tree" qemu-system-x86_64 --version | head -n 1
path=/run/qmp.sock
pids=
trap 'kill $pids 2>/dev/null || :; wait; rm -rf --one-file-system "$temporary"' EXIT

start() { # a QEMU that listens at the path; in $!
    chroot "$tree" qemu-system-x86_64 -accel tcg -nodefaults -display none -S -machine none \
        -qmp unix:$path,server=on,wait=off &
    pids="$pids $!"
    until [ -S "$tree$path" ]; do sleep 0.1; done
}
start
first=$!
mv "$tree$path" "$tree$path.first" # as one does to put a successor in its place
start
echo "inode $(stat --format=%i "$tree$path") is the second QEMU's socket"
kill "$first"
wait "$first" || :
ls "$tree$path" "$tree$path.first" 2>&1 || :
kill -0 "$!" # the second QEMU runs, and nobody can reach it
[ ! -e "$tree$path" ] && [ -S "$tree$path.first" ]
