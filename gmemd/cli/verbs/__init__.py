"""What gmemctl does: a module for each family of verbs."""
