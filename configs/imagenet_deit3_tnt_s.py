"""TNT-S on ImageNet-1k by the recipe of DeiT III: 23.8 M parameters, 5.2 GMACs.

    python train.py --config configs/imagenet_deit3_tnt_s.py --data.source tfds:imagenet2012

Not run by this project, and nobody has published it for TNT. For a ViT of the same size, 22 M parameters, the recipe
gives 81.4 top-1 after 800 epochs (arXiv 2204.07118).

An estimate: 116 to 174 chip-hours of TPU v5e, its 3.2e19 FLOPs at the 26 to 39% of the peak that other ViTs in JAX
reach.

Of that recipe are: 3-Augment with colour jitter 0.3 in the place of RandAugment and random erasing, a loss of each
class alone (BCE) without label smoothing, LAMB with its rate for 2,048 images a step, gradients clipped to a norm of 1,
each image three times in an epoch, and the whole middle of an image for evaluation. TNT has no LayerScale. For
ImageNet-21k that paper takes --data.simple-crop in the place of the random resized crop.
"""

from tnt_jax.config import DataConfig, LossConfig, ModelChanges, OptimizerConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/imagenet_deit3_tnt_s",
        model=ModelChanges("tnt_s_patch16_224", dtype="bfloat16", drop_path_rate=0.05),
        data=DataConfig(
            "tfds:imagenet2012",
            eval_split="validation",
            crop=1.0,
            auto_augment="3a",
            color_jitter=0.3,
            erasing=0.0,
            label_smoothing=0.0,
            num_workers=8,
        ),
        loss=LossConfig("binary_cross_entropy"),
        optimizer=OptimizerConfig("lamb", learning_rate=3e-3, weight_decay=0.02, clip_norm=1.0),
        batch_size=2048,
        epochs=800,
        log_every_steps=100,
    )
