"""The client, for gmemctl, tests and any other program; it needs nothing of the daemon."""
