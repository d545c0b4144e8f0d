"""Every system call that makes or measures memory, and nothing else."""
