"""`gmemd demo`, which shows in a few seconds what gmemd is for, and the guest that it runs."""
