#!/bin/bash
# base-image.sh IMAGE [PACKAGE...]   (root, Debian family, podman)
# Makes a base image with Python out of this machine's own installed packages, without any network: their files, and
# those of all they depend on, and pip. The user data base is the pristine one.
set -euo pipefail
image=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
packages=(base-files base-passwd ca-certificates coreutils dash debianutils libc-bin openssl python3 python3-venv
    sed tar util-linux "${@:2}")

apt-cache depends --recurse --installed --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces \
    --no-enhances "${packages[@]}" | sed -n 's/^\([a-z0-9][^:]*\).*/\1/p' | sort -u >"$work/names"
dpkg-query -W -f '${Package} ${binary:Package} ${db:Status-Abbrev}\n' |
    awk 'NR == FNR { wanted[$1]; next } $3 == "ii" && $1 in wanted { print $2 }' "$work/names" - >"$work/packages"

# what the packages own, less documentation; what is made when they are set up; directories nobody owns
{
    printf '%s\n' bin sbin lib lib64 etc tmp var/tmp run proc sys dev root etc/ld.so.cache etc/nsswitch.conf
    find /etc/ssl/certs /etc/alternatives | sed 's,^/,,'
    xargs dpkg -L <"$work/packages" | sed -n 's,^/\(.\),\1,p' |
        grep -vE '^(\.|(usr/share/(doc|man|locale|info|lintian|bug)|boot)(/.*)?)$' |
        sed -E 's,^(bin|sbin|lib|lib64)/,usr/\1/,'
} | sort -u | (
    cd /
    while IFS= read -r file; do
        if [ -e "$file" ] || [ -L "$file" ]; then printf '%s\n' "$file"; fi
    done
) >"$work/files"

mkdir -p "$work/own/etc" "$work/own/usr/lib/python3/dist-packages"
cp /usr/share/base-passwd/passwd.master "$work/own/etc/passwd"
cp /usr/share/base-passwd/group.master "$work/own/etc/group"
python3 -m zipfile -e /usr/share/python-wheels/pip-*.whl "$work/own/usr/lib/python3/dist-packages"
tar --numeric-owner --no-recursion -C / -cf "$work/base.tar" --exclude=etc/passwd --exclude=etc/group -T "$work/files"
tar --numeric-owner --owner=0 --group=0 -C "$work/own" -rf "$work/base.tar" \
    etc/passwd etc/group usr/lib/python3/dist-packages/pip
podman import -q "$work/base.tar" "$image"
