"""The objects, their QOM tree and records, and what they survive."""
