"""What gmemd is for, shown in a few seconds: `gmemd demo`, and the guest that it runs."""
