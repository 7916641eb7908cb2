"""A small student of digits with its teacher and without, over three seeds.

    python benchmarks/distilling.py [--epochs 200] [--images 300]

The teacher is what `python train.py` trains, 122,000 parameters on all 1,437 training images. The student has 14,000
and sees 300 of them, moved and mixed; both students train with the same batches and differ in --distill.teacher alone.
"""

import argparse
import dataclasses
import pathlib
import statistics
import tempfile

import numpy as np

import tnt_jax
from tnt_jax.commands.cli import config_of
from tnt_jax.config import DataConfig, DistillConfig
from tnt_jax.data.opening import open_split

SEEDS = (0, 1, 2)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--epochs", type=int, default=200)
    arguments.add_argument("--images", type=int, default=300)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, base = pathlib.Path(place), config_of("digits")
        taught = tnt_jax.train(dataclasses.replace(base, run_dir=f"{folder}/teacher"))
        arrays = {}
        for split, count in (("train", given.images), ("test", None)):
            images = open_split(DataConfig("digits"), split)
            arrays[f"{split}_images"] = np.stack([images[index][0] for index in range(len(images))][:count])
            arrays[f"{split}_labels"] = np.asarray(images.targets)[:count]
        np.savez(folder / "digits.npz", **arrays)
        student = dataclasses.replace(
            base,
            model=dataclasses.replace(base.model, depth=1, outer_dim=24),
            data=dataclasses.replace(base.data, source=f"npy:{folder}/digits.npz"),
            epochs=given.epochs,
            eval_every_epochs=given.epochs,
        )
        kinds = {
            "labels alone": DistillConfig(),
            "labels and teacher": DistillConfig(f"{folder}/teacher", alpha=0.9, temperature=2.0),
        }
        rows = {}
        for name, distill in kinds.items():
            runs = [
                tnt_jax.train(
                    dataclasses.replace(student, seed=seed, distill=distill, run_dir=f"{folder}/{name}-{seed}")
                )
                for seed in SEEDS
            ]
            rows[name] = [100 * scores["ema_top1"] for scores in runs]
    print(f"teacher: {100 * taught['ema_top1']:.1f}% of the test images")
    print(f"| student | {' | '.join(f'seed {seed}' for seed in SEEDS)} | mean |\n|---|{'---|' * (len(SEEDS) + 1)}")
    for name, values in rows.items():
        print(f"| {name} | {' | '.join(f'{each:.1f}%' for each in values)} | {statistics.mean(values):.1f}% |")


if __name__ == "__main__":
    main()
