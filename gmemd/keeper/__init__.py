"""The service manager where there is none: a process that keeps descriptors and starts the daemon again."""
