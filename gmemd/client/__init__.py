"""The client: for whatever asks a gmemd, gmemctl and tests alike; it needs nothing of the daemon."""
