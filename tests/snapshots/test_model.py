"""Random operations agree with a plain model: a sample of `script/robustness model`, which does ten thousand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.snapshots.model import Model


@pytest.mark.parametrize("seed", [1, 2])
def test_it_is_as_in_the_model(tmp_path: Path, seed: int) -> None:
    """Writes, snapshots, increments, restores, flattening, compressing, deleting in any order."""
    model = Model(tmp_path, seed)
    try:
        for _ in range(60):
            model.step()
    finally:
        model.close()
    assert len(model.done) >= 7
