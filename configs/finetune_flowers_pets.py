"""TNT-S on Oxford Flowers or Pets at 384x384, from weights that were trained on ImageNet-1k.

    python train.py --config configs/finetune_flowers_pets.py                       # Flowers, 102 classes
    python train.py --config configs/finetune_flowers_pets.py --data.source tfds:oxford_iiit_pet \\
        --data.train-split train --run-dir runs/finetune_pets

Published accuracy: 98.8 on Flowers and 94.7 on Pets (TNT-B: 99.0 and 95.0; arXiv 2103.00112, table 9, 300 epochs). The
paper trains on the 2,040 images of Flowers' training and validation sets and tests on 6,149. The rate is that of the
CIFAR runs; the paper gives none. Not run to its end by this project.
"""

from tnt_jax.config import DataConfig, ModelChanges, OptimizerConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/finetune_flowers",
        init_from="tnt_s_patch16_224",
        model=ModelChanges("tnt_s_patch16_224", image_size=384, dtype="bfloat16"),
        data=DataConfig("tfds:oxford_flowers102", train_split="train+validation", crop=1.0, num_workers=8),
        optimizer=OptimizerConfig(learning_rate=5e-5, weight_decay=5e-4, min_learning_rate=1e-6, ema_decay=0.9998),
        batch_size=128,
        epochs=300,
        eval_every_epochs=10,
        log_every_steps=15,
    )
