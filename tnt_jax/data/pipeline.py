"""(source, seed, step) to a batch: the same images in the same order with the same augmentation, from any step."""

from collections.abc import Iterator

import grain
import numpy as np
from PIL import Image

from tnt_jax.config import DataConfig

Batch = dict[str, np.ndarray]


def resize(image: np.ndarray, size: tuple[int, int], channels: int) -> Image.Image:
    picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
    return picture.convert("L" if channels == 1 else "RGB").resize(size[::-1], Image.Resampling.BICUBIC)


def train_batches(
    source,
    data: DataConfig,
    *,
    image_size: tuple[int, int],
    channels: int,
    batch_size: int,
    seed: int,
    start_step: int = 0,
) -> Iterator[Batch]:
    """Batches without end, beginning with that of `start_step`: image uint8 (batch, height, width, channels), label
    int32.

    An epoch has len(source) // batch_size batches and an order of its own.
    """
    steps_per_epoch = len(source) // batch_size

    def prepare(example, rng: np.random.Generator) -> dict:
        image, label = example
        image = np.asarray(resize(image, image_size, channels)).reshape(*image_size, channels)
        most = [round(data.random_shift * side) for side in image_size]
        padded = np.pad(image, [(most[0],) * 2, (most[1],) * 2, (0, 0)], mode="edge")
        top, left = (rng.integers(0, 2 * pixels + 1) for pixels in most)
        image = padded[top : top + image_size[0], left : left + image_size[1]]
        if rng.random() < data.random_flip:
            image = image[:, ::-1]
        return {"image": image, "label": np.int32(label)}

    examples = grain.MapDataset.source(source).seed(seed).shuffle()[: steps_per_epoch * batch_size].repeat()
    batches = examples.random_map(prepare).batch(batch_size)[start_step:]
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=data.num_threads, prefetch_buffer_size=16)))


def eval_batches(source, *, image_size: tuple[int, int], channels: int, batch_size: int) -> Iterator[Batch]:
    """Every image exactly once.

    As in `train_batches`, with mask bool (batch,), False where the last batch is filled up.
    """
    for start in range(0, len(source), batch_size):
        examples = [source[index] for index in range(start, min(start + batch_size, len(source)))]
        batch = {
            "image": np.stack([np.asarray(resize(image, image_size, channels)) for image, _ in examples]),
            "label": np.array([label for _, label in examples], np.int32),
            "mask": np.ones(len(examples), bool),
        }
        batch["image"] = batch["image"].reshape(-1, *image_size, channels)
        fill = batch_size - len(examples)
        yield {name: np.pad(rows, [(0, fill)] + [(0, 0)] * (rows.ndim - 1)) for name, rows in batch.items()}
