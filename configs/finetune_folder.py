"""Images of your own, in folders or in a table, from weights that were trained on ImageNet-1k.

    python train.py --config configs/finetune_folder.py --data.source folder:PATH --run-dir runs/mine
    python train.py --config configs/finetune_folder.py --data.source csv:mine.csv --run-dir runs/mine

PATH holds train/CLASS/*.jpg and val/CLASS/*.jpg; mine.csv has the columns image and label. Where there are no
validation images, a fifth of the training images is taken for them. The rate is small and smaller still near the words,
the augmentation light, and the average of weights fits a short run. Nothing is published for your data; start here, and
change one thing at a time. Verified by this project on synthetic images alone.
"""

from tnt_jax.config import DataConfig, ModelChanges, OptimizerConfig, TrainConfig

LIGHT = {"repeats": 1, "crop_area": (0.3, 1.0), "mixup": 0.0, "cutmix": 0.0, "erasing": 0.0}


def get_config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/finetune_folder",
        init_from="tnt_s_patch16_224",
        model=ModelChanges("tnt_s_patch16_224"),
        data=DataConfig("folder:images", holdout=0.2, **LIGHT),
        optimizer=OptimizerConfig(
            learning_rate=2e-4, warmup_epochs=1, min_learning_rate=1e-6, layer_decay=0.75, ema_decay=0.999
        ),
        batch_size=64,
        epochs=15,
        log_every_steps=10,
    )
