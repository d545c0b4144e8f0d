"""What a piece of memory is, and in what state: its ranges, its lease, what it occupies."""
