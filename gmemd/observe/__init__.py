"""What an operator sees: the log, the audit, the counters."""
