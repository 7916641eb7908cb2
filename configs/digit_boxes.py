"""The boxes of digits in scenes, which `benchmarks/scenes.py` makes.

    python benchmarks/scenes.py data/scenes
    python train.py --config configs/digit_boxes.py

needs `pip install tnt-jax[coco]`, for average precision.

Reached: AP 91.9% and AP50 97.5% over the ten digits of the 300 test scenes (averaged weights, seed 0), in six minutes
of a processor; AP 79% of the validation scenes after the first of four epochs. AdamW (learning rate 2e-3, batches of
32) took eight epochs to AP 91.5%.

As in `digit_scenes.py` patches of 16 pixels see a digit in four of them; the finest of RetinaNet's maps has a place
every eight pixels.
"""

from tnt_jax.config import DataConfig, ModelChanges, OptimizerConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/digit_boxes",
        model=ModelChanges(
            name="tnt_ti_patch16_224",
            image_size=64,
            in_channels=1,
            depth=4,
            inner_dim=8,
            inner_heads=2,
            outer_dim=96,
            outer_heads=3,
            drop_path_rate=0.0,
            head="retinanet",
        ),
        data=DataConfig.plain("coco:data/scenes", task="detection", label_smoothing=0.0),
        optimizer=OptimizerConfig(name="muon", learning_rate=5e-3, warmup_epochs=0.1, ema_decay=0.98, clip_norm=1.0),
        batch_size=16,
        epochs=4,
        eval_every_epochs=2,
        log_every_steps=20,
    )
