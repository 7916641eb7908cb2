"""The class of every pixel of images of your own, from weights that were trained on ImageNet-1k.

    python train.py --config configs/finetune_masks.py --data.source masks:PATH --run-dir runs/mine

PATH holds images/ and masks/ with the same names, and may hold classes.txt; a fifth of the images is held out where
there is no folder for each split. The rate is small and smaller still near the words, and images come at half to twice
the size at which they fit. Nothing is published for your data; start here, and change one thing at a time. Verified by
this project on scenes of digits alone.
"""

from tnt_jax.config import DataConfig, ModelChanges, OptimizerConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/finetune_masks",
        init_from="tnt_s_patch16_224",
        model=ModelChanges("tnt_s_patch16_224", head="mlp"),
        data=DataConfig.plain(
            "masks:data",
            task="segmentation",
            holdout=0.2,
            scale_jitter=(0.5, 2.0),
            random_flip=0.5,
            color_jitter=0.4,
            label_smoothing=0.0,
        ),
        optimizer=OptimizerConfig(
            learning_rate=2e-4, warmup_epochs=1, min_learning_rate=1e-6, layer_decay=0.75, ema_decay=0.999
        ),
        batch_size=16,
        epochs=40,
        log_every_steps=10,
    )
