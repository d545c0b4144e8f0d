"""The service manager where there is none: a process that keeps descriptors and restarts the daemon."""

# In the daemon's environment:
BARRIER_ANSWERS = "GMEMD_BARRIER_ANSWERS"  # a barrier without a byte has failed
SURE = "GMEMD_KEEPER_SURE"  # how many descriptors an answer may promise to take
SEVERAL = "GMEMD_KEEPER_SEVERAL"  # how many names one message may have, which may also ask for an answer
