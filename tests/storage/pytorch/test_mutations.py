"""Damaged and hostile checkpoints are refused with a message, or read right."""

import numpy as np
from mutations import mutated, originals, outcome
from small_models import small_model

from tnt_jax.storage.folder import model_parameters

SEEDS = 200


def test_200_mutated_checkpoints_are_refused_or_read_right(tmp_path, monkeypatch):
    model = small_model()
    files = originals(model, tmp_path)
    expected = {name: np.asarray(value) for name, value in model_parameters(model).items()}
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    counted = {"refused": 0, "right": 0}
    for seed in range(SEEDS):
        kind, what, content = mutated(seed, files)
        path = tmp_path / f"{seed}-{kind}-{what}"
        path.write_bytes(content)
        counted[outcome(path, kind, expected)] += 1
    assert counted["refused"] > SEEDS // 2
    assert list((tmp_path / "here").iterdir()) == []
