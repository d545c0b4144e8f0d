#!/bin/sh
# systemd 257 does not store an open file under a second name, and the sender is not notified.
. "$(dirname "$0")/common"
make_tree trixie systemd,mount
service=$(printf '%s' "$service" | sed 's/; exec sleep/; systemd-notify --fd=5 --fdname=second; echo barrier: $?; exec sleep/; s/\$?/$$?/')
boot <<RUN
systemctl --version | head -n 1
echo '$service' >/etc/systemd/system/demo.service
systemctl daemon-reload
systemctl start demo
until journalctl --unit=demo --output=cat --no-pager | grep barrier; do sleep 0.1; done # 0: it was processed
systemd-analyze fdstore demo.service
names=\$(systemd-analyze fdstore --json=short demo.service | grep -o '"fdname":"[a-z]*"' | tr '\n' ' ')
[ "\$names" = '"fdname":"first" ' ]
RUN
