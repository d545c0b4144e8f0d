"""Virtual machine monitors, driven by their own QMP; nothing of the daemon."""
