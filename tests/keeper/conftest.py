"""Fixtures for the keeper as a process."""

from tests.persist.conftest import no_fd_is_left

__all__ = ["no_fd_is_left"]
