"""TNT-S in DETR on COCO, from weights that were trained on ImageNet-1k.

    python train.py --config configs/coco_detr_tnt_s.py --data.source coco:data/coco

The folder holds annotations/instances_train2017.json and instances_val2017.json, and the images in train2017 and
val2017 (https://cocodataset.org/#download); `pip install tnt-jax[coco]` brings the metrics. Made for 8 accelerators
with 40 GB, 8 images on each.

Not run by this project. Published: 38.2 AP after 50 epochs on 8 GPUs (arXiv 2103.00112, table 10). That detector sees
images whose shorter side is 480 to 800 pixels; here they are fitted whole into 640 x 640, scaled by 0.5 to 2 in
training, and what is padded is seen like the rest. The rate of the blocks falls by `layer_decay` from the last to the
first, where DETR takes a tenth for all of them.
"""

from tnt_jax.config import DataConfig, ModelChanges, OptimizerConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/coco_detr_tnt_s",
        init_from="tnt_s_patch16_224",
        model=ModelChanges(
            "tnt_s_patch16_224", image_size=640, num_classes=80, head="detr", head_drop_rate=0.1, dtype="bfloat16"
        ),
        data=DataConfig.plain(
            "coco:data/coco",
            task="detection",
            scale_jitter=(0.5, 2.0),
            random_flip=0.5,
            label_smoothing=0.0,
            num_workers=8,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-4,
            warmup_epochs=0,
            min_learning_rate=1e-6,
            weight_decay=1e-4,
            layer_decay=0.85,
            clip_norm=0.1,
            ema_decay=0.9997,
        ),
        batch_size=64,
        epochs=50,
        eval_every_epochs=5,
        log_every_steps=50,
    )
