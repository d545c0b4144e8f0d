"""gmemd: a daemon that owns guest memory and speaks QMP."""

__version__ = "0.1.0"  # as in pyproject.toml; asking the installed package takes 15 ms
