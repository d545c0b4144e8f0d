#!/bin/sh
# A daemon-reload while the unit file is missing makes systemd 257 drop the stored descriptors of a running service.
. "$(dirname "$0")/common"
make_tree trixie systemd,mount
boot <<RUN
systemctl --version | head -n 1
unit=/etc/systemd/system/demo.service
echo '$service' >\$unit
systemctl daemon-reload
systemctl start demo
stored() { systemctl show --value --property=NFileDescriptorStore demo; }
before=\$(stored) pid=\$(systemctl show --value --property=MainPID demo)
mv \$unit /tmp/away
systemctl daemon-reload
mv /tmp/away \$unit
systemctl daemon-reload
after=\$(stored)
echo "stored before: \$before, after: \$after"
echo "the service: \$(systemctl is-active demo), process \$pid, now \$(systemctl show --value --property=MainPID demo)"
journalctl --unit=demo --output=cat --no-pager
[ "\$before \$after" = '1 0' ] && systemctl --quiet is-active demo
RUN
