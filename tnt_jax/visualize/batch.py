"""A picture of a training batch: originals beside what the network is fed, with labels and mixing weights.

`python visualize.py batch` writes it.
"""

import math

import jax
import numpy as np

from tnt_jax.config import TrainConfig
from tnt_jax.data.mixing import prepare_training
from tnt_jax.data.opening import open_split
from tnt_jax.data.pipeline import read, train_batches, train_recipe
from tnt_jax.data.samples import visible
from tnt_jax.models.variants import complete
from tnt_jax.tasks.table import TASKS
from tnt_jax.visualize.canvas import new_figure, panels


def batch(config: TrainConfig, *, step: int = 0, count: int = 16):
    """The first `count` images of the batch that the run trains on after `step` steps, as a figure.

    Raises:
        InputError: the data of the run are not there, or cannot be read.
    """
    source = open_split(config.data, config.data.train_split)
    model = complete(config, len(source.class_names)).model
    feed = {"batch_size": config.batch_size, "seed": config.seed}
    batches = train_batches(
        source, config.data, image_size=model.image_size, channels=model.in_channels, start_step=step, **feed
    )
    try:
        fed_batch = next(batches)
    finally:
        batches.close()
    # The key of this step in training/step.py
    key, _ = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), step))
    prepared = jax.jit(
        lambda images, labels: prepare_training(
            images, labels, data=config.data, num_classes=model.num_classes, key=key
        )
    )
    inputs, targets = map(np.asarray, prepared(fed_batch["image"], fed_batch["label"]))
    fed = inputs * np.float32(config.data.std) + np.float32(config.data.mean)
    if fed_batch["image"].dtype == np.uint8:
        fed = np.clip(fed * 255, 0, 255).round().astype(np.uint8)
    recipe = train_recipe(source, config.data, image_size=model.image_size, channels=model.in_channels, **feed)
    rows = range(min(count, config.batch_size))
    order, places = recipe.places(step, rows)
    originals = [read(recipe, int(order[place]))[0] for place in places]
    task = TASKS[config.data.task]
    captions = [task.caption(fed_batch["label"][row], targets[row], source.class_names) for row in rows]
    return _grid(list(zip(originals, fed, captions, strict=False)))


def _grid(examples: list[tuple[np.ndarray, np.ndarray, str]]):
    columns = max(1, round(math.sqrt(len(examples) / 2)))
    rows = -(-len(examples) // columns)
    figure = new_figure(3.4 * columns, 2.05 * rows)
    for axes, (original, fed, caption) in zip(panels(figure, len(examples), columns), examples, strict=True):
        for left, pixels in ((0, original), (1.04, fed)):
            height, width = (side / max(pixels.shape[:2]) for side in pixels.shape[:2])
            axes.imshow(visible(pixels), extent=(left, left + width, height, 0))
        axes.set_xlim(0, 2.04)
        axes.set_ylim(1, 0)
        axes.set_frame_on(False)
        axes.set_title(caption, fontsize=8, loc="left", pad=2)
    return figure
