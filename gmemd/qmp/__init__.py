"""The protocol: bytes to requests and back; nothing here knows memory."""
