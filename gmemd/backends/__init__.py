"""One file a qom-type."""
