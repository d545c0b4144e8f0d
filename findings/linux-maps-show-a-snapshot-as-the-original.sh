#!/bin/sh
# /proc/PID/maps shows a file in a btrfs snapshot as the original, and neither with the device that stat(1) reports.
. "$(dirname "$0")/common"
make_tree trixie btrfs-progs
uname -r
pids=
trap 'kill $pids; wait; umount "$tree/mnt" "$tree/proc"; rm -rf --one-file-system "$temporary"' EXIT
truncate -s 200M "$tree/disk"
mount -t proc proc "$tree/proc"  # mkfs asks it
chroot "$tree" mkfs.btrfs --quiet /disk
mount -o loop "$tree/disk" "$tree/mnt"
chroot "$tree" sh -euc '
    btrfs --quiet subvolume create /mnt/original
    cp /bin/sleep /mnt/original
    btrfs --quiet subvolume snapshot /mnt/original /mnt/snapshot'

show() { # original|snapshot: run its sleep and show the first mapping of it
    chroot "$tree" "/mnt/$1/sleep" 1000 &
    pids="$pids $!"
    until grep "/mnt/$1/sleep" "/proc/$!/maps" >"$temporary/maps"; do sleep 0.1; done
    read -r range _ _ device inode _ <"$temporary/maps"
    stat --format="$1: stat says device %Hd:%Ld, inode %i" "$tree/mnt/$1/sleep"
    echo "  maps says $device $inode" | tee -a "$temporary/lines"
    stat --dereference --format="  map_files leads to device %Hd:%Ld" "/proc/$!/map_files/$range" | tee -a "$temporary/files"
}
show original
show snapshot
[ "$(sort -u "$temporary/lines" | wc -l) $(sort -u "$temporary/files" | wc -l)" = '1 2' ]
