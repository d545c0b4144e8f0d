"""Read-only HTTP: health, metrics, a JSON API and the status page, all from snapshots."""
