"""The older name of gmemd.client.client, for programs that were written with it."""

from gmemd.client.client import Client, ProtocolError

__all__ = ["Client", "ProtocolError"]
