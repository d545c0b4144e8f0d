"""Other processes: their identity, which of them hold memory, and when one ends."""
