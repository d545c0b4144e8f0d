"""How a change is made: what it claims, what it undoes, what settles it, and what runs off the event loop."""
