#!/bin/bash
# [ROOT=/] boot.sh OUT   (root; util-linux 2.36, overlayfs, cgroup2)
# Boots a systemd as a real pid 1 in namespaces of its own and runs OUT/run in it as root. Exits with its status, or
# 137 after $TIMEOUT seconds (60). Its output is in OUT/log, what it writes to /out comes to OUT.
#   OUT/mounts   lines "SOURCE TARGET": directories to be seen there, read-only
#   OUT/setup    run before the boot, outside, with the tree as its argument: installs units, users, programs
# The tree is an overlay over ROOT, and nothing that is written stays. ROOT is /, with all programs of this machine,
# or another system's tree, to run under its systemd. There is no user namespace, so all that the caller may do, systemd
# may do: device rules and address rules are in force.
# After `systemctl soft-reboot` OUT/run is started again. What is mounted then is left alone below /dev only.
# Whatever kills this script kills everything inside.
set -euo pipefail
self=$(realpath "$0")

# 3. inside of all namespaces: the tree becomes /, this process becomes systemd
if [ "${1-}" = --init ]; then
    cd "$2"
    mount -t proc proc proc
    mount --bind proc/sys proc/sys
    mount -o remount,bind,ro proc/sys # systemd-sysctl must not change the host
    mount -t sysfs -o ro sysfs sys
    mount -t cgroup2 cgroup2 sys/fs/cgroup
    mkdir run/host-root
    pivot_root . run/host-root
    umount -l run/host-root
    rmdir run/host-root
    exec env -i container=gmemd-test PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd \
        --system systemd.show_status=0 </dev/null >/dev/null 2>&1
fi

# 1. mounts of our own, and cgroup2 in the place where systemd wants it
if [ "${1-}" != --mounted ]; then
    exec unshare --mount --propagation private "$self" --mounted "$(realpath "$1")"
fi
out=$2
if [ "$(stat -fc %T /sys/fs/cgroup)" != cgroup2fs ]; then
    umount -R /sys/fs/cgroup 2>/dev/null || umount -Rl /sys/fs/cgroup
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
fi

# 2. a cgroup of our own, and the tree
home=/sys/fs/cgroup$(sed -n 's/^0:://p' /proc/self/cgroup)
cgroup=/sys/fs/cgroup/gmemd-test.$$
mkdir "$cgroup"
echo $$ >"$cgroup/cgroup.procs"
leave() {
    echo $$ >"$home/cgroup.procs"
    for _ in {1..40}; do
        find "$cgroup" -depth -type d -exec rmdir {} + 2>/dev/null && break
        sleep 0.05
    done
}
trap leave EXIT

# mounts are made before anything is mounted over the places they come from
work=$out/tree
mkdir "$work"
mount -t tmpfs tmpfs "$work"
mkdir "$work"/{upper,work,root}
tree=$work/root
mount -t overlay overlay -o "lowerdir=${ROOT:-/},upperdir=$work/upper,workdir=$work/work" "$tree"
mount -t tmpfs -o mode=755 tmpfs "$tree/run"
mount -t tmpfs -o mode=1777 tmpfs "$tree/tmp"
mount -t tmpfs -o mode=755 tmpfs "$tree/dev"
mkdir "$tree"/dev/{shm,pts,hugepages,mqueue}
mount -t tmpfs -o mode=1777 tmpfs "$tree/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$tree/dev/pts"
ln -s pts/ptmx "$tree/dev/ptmx"
ln -s /proc/self/fd "$tree/dev/fd"
touch "$tree/dev/console"
for node in null:3 zero:5 full:7 random:8 urandom:9; do
    mknod -m 666 "$tree/dev/${node%:*}" c 1 "${node#*:}"
done

mkdir "$tree/dev/out"
mount --bind "$out" "$tree/dev/out"
ln -s dev/out "$tree/out"
if [ -e "$out/mounts" ]; then
    while read -r source target; do
        mkdir -p "$tree$target"
        mount --bind "$source" "$tree$target"
        mount -o remount,bind,ro "$tree$target"
    done <"$out/mounts"
fi

: >"$tree/etc/fstab"
units=$tree/etc/systemd/system
mkdir -p "$units"
# the first three would reach the host's kernel, the rest is other people's
for unit in systemd-modules-load.service kmod-static-nodes.service systemd-journald-audit.socket \
    timers.target paths.target; do
    ln -sf /dev/null "$units/$unit"
done
[ ! -e "$out/setup" ] || "$out/setup" "$tree"

# when run ends by itself, systemd ends (SIGRTMIN+14)
cat >"$units/gmemd-test.service" <<'UNIT'
[Unit]
After=basic.target dbus.socket
Wants=dbus.socket
[Service]
Type=exec
ExecStart=/bin/sh -c '/out/run; echo $$? >/out/status; kill -s RTMIN+14 1; exec sleep infinity'
KillMode=mixed
TimeoutStopSec=2
StandardOutput=append:/out/log
StandardError=append:/out/log
UNIT
cat >"$units/gmemd-test.target" <<'UNIT'
[Unit]
Requires=basic.target gmemd-test.service
After=basic.target
AllowIsolate=yes
UNIT
ln -sf gmemd-test.target "$units/default.target"

setpriv --pdeathsig KILL timeout -s KILL "${TIMEOUT:-60}" setpriv --pdeathsig KILL \
    unshare --pid --fork --kill-child --ipc --uts --net --cgroup --mount "$self" --init "$tree" || :
[ -e "$out/status" ] || exit 137
exit "$(cat "$out/status")"
