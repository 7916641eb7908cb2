"""PyramidTNT-S in RetinaNet on COCO, from weights that were trained on ImageNet-1k.

    python train.py --config configs/coco_retinanet_ptnt_s.py --data.source coco:data/coco --init-from MODEL

The folder is that of coco_detr_tnt_s.py. The published weights of PyramidTNT-S lie behind passwords; MODEL is a file or
folder that holds them, or a training run. Made for 8 accelerators with 40 GB, 2 images on each.

Not run by this project. Published: 42.0 AP after 12 epochs (arXiv 2201.00978, table 7), at a rate of 1e-4 with AdamW
and a weight decay of 0.05. That detector brings the maps of the stages to strides of 4 to 32 by transposed
convolutions and sees images with a shorter side of 800 pixels; here its five levels are the four stages and a coarser
map, strides of 8 to 128, and images are fitted whole into 768 x 768.
"""

from tnt_jax.config import DataConfig, ModelChanges, OptimizerConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/coco_retinanet_ptnt_s",
        model=ModelChanges("ptnt_s_patch16_256", image_size=768, num_classes=80, head="retinanet", dtype="bfloat16"),
        data=DataConfig.plain(
            "coco:data/coco",
            task="detection",
            scale_jitter=(0.8, 1.25),
            random_flip=0.5,
            label_smoothing=0.0,
            num_workers=8,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_epochs=0.1, min_learning_rate=1e-6, ema_decay=0.999),
        batch_size=16,
        epochs=12,
        log_every_steps=50,
    )
