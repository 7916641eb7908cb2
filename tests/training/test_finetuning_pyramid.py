"""A PyramidTNT that was trained at one size goes on at another."""

import dataclasses

import pytest
from commands import ROOT

from tnt_jax.commands.cli import training_config
from tnt_jax.config import ModelChanges
from tnt_jax.training.loop import train


@pytest.mark.nightly
def test_digits_at_another_size_lose_no_accuracy(tmp_path):
    digits = training_config(["--config", str(ROOT / "configs/digits.py")])
    model = ModelChanges(
        "ptnt_ti_patch16_192",
        image_size=32,
        in_channels=1,
        depth=(1, 1, 1, 1),
        inner_dim=(4, 8, 8, 8),
        inner_heads=(1, 2, 2, 2),
        outer_dim=(32, 64, 64, 64),
        outer_heads=(2, 2, 2, 2),
        drop_path_rate=0.0,
    )
    first = dataclasses.replace(
        digits,
        run_dir=str(tmp_path / "at_32"),
        model=model,
        optimizer=dataclasses.replace(digits.optimizer, warmup_epochs=1),
        batch_size=32,
        epochs=10,
    )
    before = train(first)["ema_top1"]
    assert before > 0.98
    second = dataclasses.replace(
        first,
        run_dir=str(tmp_path / "at_40"),
        init_from=first.run_dir,
        model=dataclasses.replace(model, image_size=40),  # 5 x 5 sentences, an odd grid
        optimizer=dataclasses.replace(first.optimizer, learning_rate=1e-3),
        epochs=8,
    )
    assert train(second)["ema_top1"] > before - 0.01  # three of the 360 test images
