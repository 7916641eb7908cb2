"""PyramidTNT-B on ImageNet-1k as it was published: 157.0 M parameters, 16.0 GMACs at 256x256.

    python train.py --config configs/imagenet_ptnt_b.py --data.source tfds:imagenet2012

Published accuracy: 84.1 top-1 (huawei's page of arXiv 2201.00978). Not run to its end by this project: verified are the
network (every size by its published numbers of parameters and MACs, Ti and S block by block), the recipe's parts, and
that the configuration trains.

An estimate: 138 to 206 chip-hours of TPU v5e or more, its 3.8e19 FLOPs at the 26 to 39% of the peak that other ViTs in
JAX reach; the words of this network have no kernel there.

The recipe is that of configs/imagenet_ptnt_s.py, which describes it.
"""

from tnt_jax.config import DataConfig, ModelChanges, OptimizerConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/imagenet_ptnt_b",
        model=ModelChanges("ptnt_b_patch16_256", dtype="bfloat16"),
        data=DataConfig("tfds:imagenet2012", eval_split="validation", num_workers=8),
        optimizer=OptimizerConfig(warmup_epochs=20, cooldown_epochs=10, change_every="epoch", ema_warmup=False),
        batch_size=1024,
        epochs=300,
        log_every_steps=100,
    )
