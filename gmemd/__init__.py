"""gmemd: a daemon that owns guest memory and speaks QMP."""
