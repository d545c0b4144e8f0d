#!/bin/sh
# cgroup2.sh COMMAND...   (root)
# Runs a command where /sys/fs/cgroup is a pure cgroup2, in mounts of its own: crun refuses a mixture of versions.
set -eu
if [ "${1-}" != --mounted ]; then exec unshare --mount --propagation private "$0" --mounted "$@"; fi
shift
if [ "$(stat -fc %T /sys/fs/cgroup)" != cgroup2fs ]; then
    umount -R /sys/fs/cgroup 2>/dev/null || umount -Rl /sys/fs/cgroup
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
fi
exec "$@"
