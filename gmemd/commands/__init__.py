"""One plain function for each command of the schema."""
