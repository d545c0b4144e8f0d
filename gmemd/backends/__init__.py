"""One file for each qom-type."""
