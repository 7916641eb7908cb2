"""A small TNT on Fashion-MNIST: 60,000 images of clothes for training, 10,000 for testing, 28x28 grey pixels.

    apt-get install dataset-fashion-mnist
    python train.py --config configs/fashion_mnist.py

The Debian package puts the four published files where this configuration looks for them; `--data.source idx:FOLDER`
reads them from anywhere else.
"""

from tnt_jax.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/fashion_mnist",
        model=ModelConfig(
            name="tnt_ti_patch16_224",
            image_size=28,
            in_channels=1,
            patch_size=7,
            word_stride=2,
            depth=3,
            inner_dim=6,
            inner_heads=2,
            outer_dim=96,
            outer_heads=3,
            drop_path_rate=0.0,
        ),
        data=DataConfig.plain("idx:/usr/share/datasets/fashion-mnist", random_shift=0.05, random_flip=0.5),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_epochs=0.5, ema_decay=0.999),
        batch_size=128,
        epochs=5,
        log_every_steps=50,
    )
