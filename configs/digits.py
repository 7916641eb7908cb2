"""A small TNT on scikit-learn's handwritten digits: what `python train.py` runs when it is told nothing."""

from tnt_jax.config import DataConfig, ModelChanges, OptimizerConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/digits",
        model=ModelChanges(
            name="tnt_ti_patch16_224",
            image_size=32,
            in_channels=1,
            patch_size=8,
            word_stride=2,
            depth=2,
            inner_dim=6,
            inner_heads=2,
            outer_dim=96,
            outer_heads=3,
            drop_path_rate=0.0,
        ),
        data=DataConfig.plain("digits", random_shift=0.05),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_epochs=5, ema_decay=0.995),
        batch_size=16,
        epochs=28,
        eval_every_epochs=2,
        log_every_steps=20,
    )
