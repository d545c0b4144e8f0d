"""What exists and what is allowed: QAPI is the source, everything else derives from it."""
