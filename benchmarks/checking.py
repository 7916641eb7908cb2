"""The time of `tnt-check` over 10,000 JPEGs beside a loop that has Pillow verify and decode each, in turns.

    python benchmarks/checking.py [--images 10000] [--rounds 3]

The files are crops of the photographs that scikit-learn ships, 500 x 375 pixels, some of them cut off; both must find
these. Each is a process of its own with its imports, as it is typed.
"""

import argparse
import io
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image

LOOP = """
import pathlib, sys
from PIL import Image
wrong = 0
for path in sorted(pathlib.Path(sys.argv[1]).rglob("*.jpg")):
    try:
        with Image.open(path) as image:
            image.verify()
        with Image.open(path) as image:
            image.load()
    except Exception:
        wrong += 1
print(f"{wrong:,} cannot be read")
"""


def write_images(folder: pathlib.Path, count: int) -> int:
    """Writes files in two classes; how many of them are cut off."""
    from sklearn.datasets import load_sample_images

    photographs, rng, cut = load_sample_images().images, np.random.default_rng(0), 0
    for number in range(count):
        photograph = photographs[number % 2]
        top, left = rng.integers(photograph.shape[0] - 375), rng.integers(photograph.shape[1] - 500)
        made = io.BytesIO()
        Image.fromarray(photograph[top : top + 375, left : left + 500]).save(made, "JPEG", quality=90)
        content = made.getvalue()
        if number % 997 == 500:
            content, cut = content[: len(content) // 2], cut + 1
        path = folder / f"class {number % 2}/{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    return cut


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--images", type=int, default=10_000)
    arguments.add_argument("--rounds", type=int, default=3)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cut = write_images(pathlib.Path(folder), given.images)
        holdout = ["--data.holdout", "0.1"]
        commands = {
            "Pillow, verify and load in a loop": [sys.executable, "-c", LOOP, folder],
            "tnt-check": [sys.executable, "-m", "tnt_jax.commands.check", f"folder:{folder}", *holdout],
        }
        seconds, processor = {name: [] for name in commands}, {name: [] for name in commands}
        for _ in range(given.rounds):
            for name, command in commands.items():
                began, used = time.perf_counter(), _processor_seconds()
                done = subprocess.run(command, capture_output=True, text=True)
                seconds[name].append(time.perf_counter() - began)
                processor[name].append(_processor_seconds() - used)
                assert f"{cut:,} cannot be read" in done.stdout, done.stdout + done.stderr
    load = os.getloadavg()[0]
    print(f"{given.images:,} images, {os.cpu_count()} cores, load {load:.1f} at the end\n")
    print("| | seconds | images a second | times as fast | seconds of a processor |\n|---|---|---|---|---|")
    slow = statistics.median(seconds["Pillow, verify and load in a loop"])
    for name, each in seconds.items():
        middle, of_cores = statistics.median(each), statistics.median(processor[name])
        print(f"| {name} | {middle:.1f} | {given.images / middle:,.0f} | {slow / middle:.2f} | {of_cores:.1f} |")


def _processor_seconds() -> float:
    """What the processes that have ended took of the cores, which others on the machine change little."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
