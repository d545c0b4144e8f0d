"""The HTTP side-door: health, metrics, a JSON API and the status page. It reads snapshots and changes nothing."""
