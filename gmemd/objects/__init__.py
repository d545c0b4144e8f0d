"""The objects there are, and what survives of them."""
