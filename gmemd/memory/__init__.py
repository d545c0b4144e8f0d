"""The state of a piece of memory: its ranges, its lease, what it occupies."""
