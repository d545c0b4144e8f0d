"""The service manager where there is none: a process that keeps descriptors and restarts the daemon."""

BARRIER_ANSWERS = "GMEMD_BARRIER_ANSWERS"  # in the daemon's environment: a barrier without a byte has failed
