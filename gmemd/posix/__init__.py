"""What any program on Linux may need: sockets, standard streams, lines for a slow reader, time since boot."""
