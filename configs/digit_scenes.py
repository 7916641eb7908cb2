"""The class of every pixel in scenes of digits, which `benchmarks/scenes.py` makes.

python benchmarks/scenes.py data/scenes
python train.py --config configs/digit_scenes.py
"""

from tnt_jax.config import DataConfig, ModelChanges, OptimizerConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/digit_scenes",
        model=ModelChanges(
            name="tnt_ti_patch16_224",
            image_size=64,
            in_channels=1,
            patch_size=8,
            word_stride=2,
            depth=4,
            inner_dim=8,
            inner_heads=2,
            outer_dim=96,
            outer_heads=3,
            drop_path_rate=0.0,
            head="mlp",
        ),
        data=DataConfig.plain("masks:data/scenes", task="segmentation", label_smoothing=0.0),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_epochs=1, ema_decay=0.995),
        batch_size=32,
        epochs=20,
        eval_every_epochs=1,
        log_every_steps=20,
    )
