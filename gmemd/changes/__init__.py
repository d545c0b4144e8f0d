"""How a change is made: what it claims, what runs beside the event loop, what is undone."""
