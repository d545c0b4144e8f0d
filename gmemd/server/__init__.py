"""Connections: sockets, monitors, and the event loop that serves them."""
