"""TNT-B on ImageNet-1k as it was published: 65.4 M parameters, 14.0 GMACs.

    python train.py --config configs/imagenet_tnt_b.py --data.source tfds:imagenet2012

Published accuracy: 82.9 top-1, 96.3 top-5, on 8 V100 (arXiv 2103.00112, table 4). Not run to its end by this project:
verified are the steps (40 of the published ones, digit by digit), the recipe's parts, and that the configuration
trains.

An estimate: 121 to 182 chip-hours of TPU v5e, its 3.3e19 FLOPs at the 26 to 39% of the peak that other ViTs in JAX
reach.

The recipe is that of configs/imagenet_tnt_s.py, which describes it.
"""

from tnt_jax.config import DataConfig, ModelChanges, OptimizerConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/imagenet_tnt_b",
        model=ModelChanges("tnt_b_patch16_224", dtype="bfloat16"),
        data=DataConfig("tfds:imagenet2012", eval_split="validation", num_workers=8),
        optimizer=OptimizerConfig(cooldown_epochs=10, change_every="epoch", ema_warmup=False),
        batch_size=1024,
        epochs=300,
        log_every_steps=100,
    )
