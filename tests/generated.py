"""Generated data sets, each with a task of its own, as sources `generated:NAME`."""

import csv
import dataclasses

import numpy as np
from PIL import Image

from tnt_jax.config import DataConfig, ModelChanges, OptimizerConfig, TrainConfig
from tnt_jax.data import opening
from tnt_jax.data.sources import NoSplitError, Split

SIDE = 16
SHAPES = ("disc", "square", "cross", "bar")
"""Of 1:50: the last class is rare."""


def canvas(rng):
    return rng.integers(0, 60, (SIDE, SIDE)).astype(np.int32)


def draw(image, shape, row, column, ink):
    """A shape of 5 pixels in diameter with its middle at a place."""
    rows, columns = np.mgrid[-row : SIDE - row, -column : SIDE - column]
    near = np.maximum(abs(rows), abs(columns)) <= 2
    inside = {
        "disc": rows**2 + columns**2 <= 5,
        "square": near & (np.maximum(abs(rows), abs(columns)) == 2),
        "cross": near & (abs(rows) == abs(columns)),
        "bar": near & (columns == 0),
    }
    image[inside[shape]] = ink


def shapes(count, seed):
    """Each shape is there or not, in a quarter of its own; multi_label."""
    rng = np.random.default_rng(seed)
    images, labels = [], rng.integers(0, 2, (count, len(SHAPES))).astype(np.float32)
    for there in labels:
        image, quarters = canvas(rng), rng.permutation(4)
        for quarter, shape, wanted in zip(quarters, SHAPES, there, strict=True):
            if wanted:
                row, column = rng.integers(2, 6, 2) + 8 * np.array(divmod(int(quarter), 2))
                draw(image, shape, row, column, 200)
        images.append(image)
    return Split(np.array(images, np.uint8)[..., None], labels, SHAPES)


def position(count, seed):
    """Where a disc lies, in units that are not those of pixels; regression."""
    rng = np.random.default_rng(seed)
    places, images = rng.integers(2, SIDE - 2, (count, 2)), []
    for row, column in places:
        image = canvas(rng)
        draw(image, "disc", row, column, 200)
        images.append(image)
    targets = np.stack([1000 + 50 * places[:, 0], -0.01 * places[:, 1]], axis=1).astype(np.float32)
    return Split(np.array(images, np.uint8)[..., None], targets, ("depth", "angle"))


def rare(count, seed):
    """Two classes as 50 to 1 in training, alike in the test images, that are not easily told apart."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 51 == 0 if seed == 0 else np.arange(count) % 2 == 0
    images = []
    for is_rare in labels:
        image = canvas(rng)
        draw(image, "cross" if is_rare else "square", *rng.integers(3, SIDE - 3, 2), 150)
        images.append(image)
    return Split(np.array(images, np.uint8)[..., None], labels.astype(np.int32), ("square", "cross"))


MAKERS = {"shapes": shapes, "position": position, "rare": rare}
COUNTS = {"train": 2048, "validation": 400, "test": 400}
SEEDS = {"train": 0, "test": 1, "validation": 2}


def install(monkeypatch, counts=COUNTS):
    def open_generated(argument, data, split):
        if split not in counts:
            raise NoSplitError(split, counts)
        return dataclasses.replace(MAKERS[argument](counts[split], SEEDS[split]), name=split)

    monkeypatch.setitem(opening.SOURCES, "generated", opening.Source(open_generated))


MODEL = ModelChanges(
    "tnt_ti_patch16_224",
    image_size=SIDE,
    in_channels=1,
    patch_size=4,
    word_stride=2,
    depth=2,
    inner_dim=4,
    inner_heads=2,
    outer_dim=48,
    outer_heads=3,
    drop_path_rate=0.0,
)


def run_of(run_dir, name, task, *, epochs=12, sampling="natural", model=MODEL, **changes) -> TrainConfig:
    return TrainConfig(
        run_dir=str(run_dir),
        model=model,
        data=DataConfig.plain(f"generated:{name}", task=task, sampling=sampling, label_smoothing=0.0),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_epochs=2, ema_decay=0.99),
        batch_size=64,
        epochs=epochs,
        eval_every_epochs=epochs,
        **changes,
    )


FEW = {"train": 256, "validation": 60, "test": 60}


def write_table(folder, name):
    """A CSV of PNG files with the images and targets of a generated source."""
    rows = []
    (folder / "images").mkdir(parents=True)
    for split, count in FEW.items():
        source = MAKERS[name](count, SEEDS[split])
        for index in range(count):
            path, target = f"images/{split}{index}.png", source.targets[index]
            Image.fromarray(source.images[index, ..., 0]).save(folder / path)
            if name == "shapes":
                told = {"labels": "|".join(np.array(source.class_names)[target > 0])}
            else:
                told = dict(zip(source.class_names, map(float, target), strict=True))
            rows.append({"image": path, "split": split, **told})
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return f"csv:{folder / 'table.csv'}"
