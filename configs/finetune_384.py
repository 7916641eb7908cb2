"""TNT-S from 224x224 to 384x384 on ImageNet-1k.

    python train.py --config configs/finetune_384.py

Published accuracy: 83.1 top-1 (TNT-B: 83.9; arXiv 2103.00112, table 9). The paper says "the same settings and
augmentations" and that positions are interpolated, and no more; the length and the rate are those of DeiT's 384 runs
(30 epochs, 5e-6 for 512 images). Not run to its end by this project: verified is that the positions are timm's and that
the configuration trains.
"""

from tnt_jax.config import DataConfig, ModelChanges, OptimizerConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/finetune_384",
        init_from="tnt_s_patch16_224",
        model=ModelChanges("tnt_s_patch16_224", image_size=384, dtype="bfloat16", remat="all"),
        data=DataConfig("tfds:imagenet2012", eval_split="validation", crop=1.0, num_workers=8),
        optimizer=OptimizerConfig(
            learning_rate=5e-6, min_learning_rate=1e-6, warmup_epochs=1, weight_decay=1e-8, ema_decay=0.9999
        ),
        batch_size=512,
        epochs=30,
        log_every_steps=100,
    )
