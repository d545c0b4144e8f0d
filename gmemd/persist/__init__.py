"""What outlives the process: fd store, registry, keeper."""
