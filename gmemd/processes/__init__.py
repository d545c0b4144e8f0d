"""Other processes: who one is, who holds memory, when one ends."""
