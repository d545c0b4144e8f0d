"""gmemctl's verbs: a module for each family."""
