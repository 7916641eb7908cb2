"""TNT-S with SegFormer's head on ADE20K (SceneParsing, 150 classes), from weights that were trained on ImageNet-1k.

    python train.py --config configs/ade20k_tnt_s.py --data.source masks:ADEChallengeData2016

The folder is that of the benchmark, http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip: 20,210
images in images/training with their masks in annotations/training, and 2,000 in validation. In the masks 0 is not
labelled, and the classes are 1 to 150. Made for 8 GPUs, 2 images on each: 40 epochs are 50,520 steps of 16 images.

Not run by this project. Published, of another model: TNT-S in Trans2Seg reaches 43.6 mIoU after 40,000 steps at a rate
of 1e-4 (table 11 of arXiv 2103.00112). Nobody can repeat that faithfully, for Trans2Seg's repository has no
configuration for ADE20K. Here the head is another one, and what it reaches is not known. Evaluation fits images whole
into 512 x 512 pixels, where papers keep their size and take windows.
"""

from tnt_jax.config import DataConfig, ModelChanges, OptimizerConfig, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/ade20k_tnt_s",
        init_from="tnt_s_patch16_224",
        model=ModelChanges("tnt_s_patch16_224", image_size=512, num_classes=150, head="mlp", head_drop_rate=0.1),
        data=DataConfig.plain(
            "masks:ADEChallengeData2016",
            task="segmentation",
            ignore=(0,),
            scale_jitter=(0.5, 2.0),
            random_flip=0.5,
            color_jitter=0.4,
            label_smoothing=0.0,
            num_workers=8,
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, warmup_epochs=1, min_learning_rate=1e-6, layer_decay=0.9, ema_decay=0.999
        ),
        batch_size=16,
        epochs=40,
        eval_every_epochs=4,
        log_every_steps=50,
    )
