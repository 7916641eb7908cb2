"""Images per second of our loader and of timm's, in turns, on the same JPEGs.

    python benchmarks/loader.py --timm-python /path/to/another/venv/bin/python [--rounds 3]

timm's loader needs PyTorch and torchvision, which this project does not: give it an environment of its own,
`pip install timm==1.0.31 torch==2.14.1 torchvision==0.29.1 scikit-image scikit-learn`.

Both loaders run the whole recipe to the batch that the network is fed, normalised, mixed and erased, on the CPU:
decoding, random resized crop, flip, RandAugment, mixup or cutmix, random erasing; and evaluation's resize and crop.
Each measurement is a process of its own, pinned to one core or to two. timm has as many worker processes, ours as many
threads, which on two cores are those of a worker process. Images per processor second depend less on what else runs on
the machine. Memory is the sum of the proportional set sizes of the processes, so that what they share is counted once.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

BATCH = 128  # what each of the published run's GPUs had
SIZE = 224
WARM_UP, MEASURED = 2, 6  # batches
COUNTS = {"train": (WARM_UP + MEASURED + 4) * BATCH, "val": (WARM_UP + MEASURED + 4) * BATCH}
ROOT = pathlib.Path(__file__).resolve().parents[1]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--timm-python", required=True)
    arguments.add_argument("--rounds", type=int, default=3)
    given = arguments.parse_args()
    loaders = {"ours": sys.executable, "timm": given.timm_python}
    with tempfile.TemporaryDirectory() as photos:
        _child(given.timm_python, "photos", photos)
        print("| | | images/s | | | images per processor second | | | MB | |")
        print("|---|---|---|---|---|---|---|---|---|---|")
        print("| task | cores | ours | timm | ratio | ours | timm | ratio | ours | timm |")
        for task in ("train", "eval"):
            for cores in (1, 2):
                rounds = [
                    {name: _child(python, name, photos, task, cores) for name, python in loaders.items()}
                    for _ in range(given.rounds)
                ]
                print(_row(task, cores, rounds), flush=True)


def _row(task: str, cores: int, rounds: list[dict]) -> str:
    """Medians over the rounds; the ratio is the median of the ratios within a round."""

    def median(loader: str, what: str) -> float:
        return statistics.median(each[loader][what] for each in rounds)

    cells = [task, cores]
    for what in ("speed", "efficiency"):
        ratio = statistics.median(each["ours"][what] / each["timm"][what] for each in rounds)
        cells += [f"{median('ours', what):.0f}", f"{median('timm', what):.0f}", f"{ratio:.2f}"]
    cells += [f"{median(loader, 'memory'):.0f}" for loader in ("ours", "timm")]
    return f"| {' | '.join(map(str, cells))} |"


def _child(python: str, what: str, photos: str, task: str = "", cores: int = 1) -> dict:
    available = sorted(os.sched_getaffinity(0))[-cores:]
    one = {"OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [python, __file__, "--child", what, photos, task, *map(str, available)],
        env=os.environ | one, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def make_photos(folder: str) -> dict:
    """500x375 JPEGs, cut out of the photographs that scikit-image and scikit-learn ship."""
    import numpy as np
    import skimage
    import sklearn
    from PIL import Image

    shipped = [
        pathlib.Path(skimage.__file__).parent / "data",
        pathlib.Path(sklearn.__file__).parent / "datasets/images",
    ]
    names = (
        "astronaut.png",
        "chelsea.png",
        "coffee.png",
        "rocket.jpg",
        "motorcycle_left.png",
        "china.jpg",
        "flower.jpg",
    )
    photos = [Image.open(path / name).convert("RGB") for name in names for path in shipped if (path / name).exists()]
    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        for index in range(count):
            photo = photos[index % len(photos)]
            width = int(min(photo.width, photo.height * 4 / 3) * rng.uniform(0.6, 1))
            height = width * 3 // 4
            left, top = rng.integers(0, photo.width - width + 1), rng.integers(0, photo.height - height + 1)
            path = pathlib.Path(folder) / split / f"class{index % len(photos)}" / f"{index:05}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            photo.crop((left, top, left + width, top + height)).resize((500, 375)).save(path, quality=92)
    return {}


def ours(folder: str, task: str, cores: int) -> dict:
    import functools

    import jax
    import numpy as np

    from tnt_jax.config import DataConfig
    from tnt_jax.data import mixing
    from tnt_jax.data.opening import open_split
    from tnt_jax.data.pipeline import eval_batches, train_batches

    data = DataConfig(num_workers=cores - 1, num_threads=cores)
    feed = {"image_size": (SIZE, SIZE), "channels": 3, "batch_size": BATCH}
    if task == "train":
        batches = train_batches(open_split(DataConfig(f"folder:{folder}"), "train"), data, **feed, seed=0)
        prepare = jax.jit(functools.partial(mixing.prepare_training, data=data, num_classes=1000))
        key = jax.random.key(0)

        def fed():
            for step, batch in enumerate(batches):
                yield prepare(batch["image"], batch["label"], key=jax.random.fold_in(key, step))[0]
    else:
        batches = eval_batches(open_split(DataConfig(f"folder:{folder}"), "test"), data, **feed)
        normalise = jax.jit(functools.partial(mixing.normalise, by=data))

        def fed():
            for batch in batches:
                yield normalise(batch["image"])

    def finished():
        """A batch is computed while the next is prepared, as in training; what is counted is complete."""
        previous = None
        for images in fed():
            if previous is not None:
                yield np.asarray(previous)
            previous = images

    try:
        return measure(finished())
    finally:
        batches.close()


def timms(folder: str, task: str, cores: int) -> dict:
    import torch
    from PIL import Image, ImageOps
    from timm.data import FastCollateMixup, create_dataset, create_loader

    torch.set_num_threads(1)
    posterize = ImageOps.posterize
    # timm asks for 0 bits now and then, which Pillow refuses since version 13. Older ones gave black.
    ImageOps.posterize = lambda image, bits: posterize(image, bits) if bits else Image.new("RGB", image.size)
    shared = {
        "input_size": (3, SIZE, SIZE), "batch_size": BATCH, "mean": (0.5,) * 3, "std": (0.5,) * 3,
        "num_workers": cores, "device": torch.device("cpu"), "pin_memory": False, "persistent_workers": False,
    }  # fmt: skip
    if task == "train":
        mix = FastCollateMixup(
            mixup_alpha=0.8, cutmix_alpha=1.0, prob=1.0, switch_prob=0.5, label_smoothing=0.1, num_classes=1000
        )
        loader = create_loader(
            create_dataset("", folder, split="train"), **shared, is_training=True, collate_fn=mix,
            auto_augment="rand-m9-mstd0.5-inc1", color_jitter=0.4, interpolation="random",
            re_prob=0.25, re_mode="pixel",
        )  # fmt: skip
    else:
        loader = create_loader(create_dataset("", folder, split="val"), **shared, interpolation="bicubic", crop_pct=0.9)
    return measure(images for images, _ in loader)


def measure(batches) -> dict:
    """Images per second after the warm-up, and megabytes at the end of it."""
    for _ in range(WARM_UP):
        next(batches)
    start, worked = time.perf_counter(), sum(map(_processor_time, _family(os.getpid())))
    for _ in range(MEASURED):
        next(batches)
    seconds = time.perf_counter() - start
    family = _family(os.getpid())
    return {
        "speed": MEASURED * BATCH / seconds,
        "efficiency": MEASURED * BATCH / (sum(map(_processor_time, family)) - worked),
        "memory": sum(map(_memory, family)),
    }


def _family(pid: int) -> list[int]:
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(below for child in children for below in _family(int(child)))]


def _processor_time(pid: int) -> float:
    """Seconds of all threads, in user and in system mode."""
    ticks = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def _memory(pid: int) -> float:
    lines = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _, _, what, folder, task, *cores = sys.argv
        os.sched_setaffinity(0, set(map(int, cores)))
        result = (
            make_photos(folder) if what == "photos" else {"ours": ours, "timm": timms}[what](folder, task, len(cores))
        )
        print(json.dumps(result))
    else:
        main()
