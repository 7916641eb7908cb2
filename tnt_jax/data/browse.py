"""A picture of a training batch: originals beside what the network is fed, with labels and mixing weights.

    python -m tnt_jax.data.browse --config configs/imagenet_tnt_s.py [--out batch.png] [--step 0] [--images 16]

takes the flags of train.py too, `--data.source folder:photos`. The images are those of that step of the run.
"""

import argparse
import dataclasses
import sys

import jax
import numpy as np
from PIL import Image, ImageDraw

from tnt_jax.cli import run_command, training_config
from tnt_jax.config import InputError, TrainConfig
from tnt_jax.data.augment import to_pillow
from tnt_jax.data.mixing import prepare_training
from tnt_jax.data.pipeline import TrainRecipe, read, train_batches
from tnt_jax.data.sources import open_source
from tnt_jax.models.variants import resolve

TILE = 160  # pixels, for each of the two pictures of an image
MARGIN, CAPTION = 8, 30


def draw_batch(config: TrainConfig, step: int, count: int) -> Image.Image:
    """The first `count` images of the batch that the run trains on after `step` steps."""
    source = open_source(config.data.source, config.data.train_split)
    model = resolve(dataclasses.replace(config.model, num_classes=len(source.class_names)))
    feed = {"batch_size": config.batch_size, "seed": config.seed}
    batches = train_batches(
        source, config.data, image_size=model.image_size, channels=model.in_channels, start_step=step, **feed
    )
    try:
        batch = next(batches)
    finally:
        batches.close()
    # The key of this step in training/step.py
    key, _ = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), step))
    prepared = jax.jit(
        lambda images, labels: prepare_training(
            images, labels, data=config.data, num_classes=model.num_classes, key=key
        )
    )
    inputs, targets = map(np.asarray, prepared(batch["image"], batch["label"]))
    fed = np.clip((inputs * config.data.std + config.data.mean) * 255, 0, 255).round().astype(np.uint8)
    recipe = TrainRecipe(source, config.data, (*model.image_size, model.in_channels), **feed)
    order, places = recipe.places(step)
    rows = range(min(count, config.batch_size))
    originals = [read(recipe, int(order[places[row]]))[0] for row in rows]
    captions = [_caption(batch["label"], targets, row, source.class_names) for row in rows]
    return _grid(list(zip(originals, fed, captions, strict=False)))


def _caption(labels: np.ndarray, targets: np.ndarray, row: int, class_names: tuple[str, ...]) -> str:
    """The class of the image, and below it what the network should answer."""
    likely = [label for label in np.argsort(-targets[row])[:2] if targets[row, label] > 0.05]
    return f"{class_names[labels[row]]}\n" + ", ".join(
        f"{targets[row, label]:.2f} {class_names[label]}" for label in likely
    )


def _grid(examples: list[tuple[np.ndarray, np.ndarray, str]]) -> Image.Image:
    columns = max(1, round(np.sqrt(len(examples) / 2)))
    width, height = 2 * TILE + MARGIN, TILE + CAPTION + MARGIN
    picture = Image.new("RGB", (columns * width + MARGIN, -(-len(examples) // columns) * height + MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    for index, (original, fed, caption) in enumerate(examples):
        left, top = MARGIN + index % columns * width, MARGIN + index // columns * height
        for shift, pixels in ((0, original), (TILE, fed)):
            tile = to_pillow(pixels).convert("RGB")
            scale = (TILE - 2) / max(tile.size)
            tile = tile.resize([max(1, round(side * scale)) for side in tile.size], Image.Resampling.BICUBIC)
            picture.paste(tile, (left + shift, top))
        draw.multiline_text((left, top + TILE), caption, fill="black", spacing=1, font_size=11)
    return picture


def main() -> None:
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--out", default="batch.png")
    own.add_argument("--step", type=int, default=0)
    own.add_argument("--images", type=int, default=16)
    given, rest = own.parse_known_args(sys.argv[1:])
    if given.step < 0 or given.images < 1:
        raise InputError(f"--step is {given.step} and --images {given.images}; they start at 0 and at 1")
    draw_batch(training_config(rest), given.step, given.images).save(given.out)
    print(f"{given.out} shows the batch after step {given.step}: each original, and beside it what the network is fed")


if __name__ == "__main__":
    run_command(main)
