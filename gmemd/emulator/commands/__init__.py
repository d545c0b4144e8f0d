"""The commands of the machine, and those of gmemd that a machine changes."""
