"""What a configuration reaches that trains on a laptop: a row for each seed.

    python benchmarks/trained.py digits [--seeds 0 1 2] [--again] [--keep runs/digits]
    python benchmarks/trained.py digit_scenes            the scenes are made first
    python benchmarks/trained.py fashion_mnist           needs the data, see the configuration

Each is `train.py --config NAME`, then `eval.py` on the test images: averaged weights. Time is that of the processors,
all cores together, for the training alone. With --again the first seed is trained twice, and the parameters compared.
"""

import argparse
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCENES = {"digit_scenes": "masks", "digit_boxes": "coco"}
METRICS = ("top-1", "mIoU", "AP")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("name")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments.add_argument("--again", action="store_true", help="train the first seed once more")
    arguments.add_argument("--keep", type=pathlib.Path, help="the folder in which the run of the first seed stays")
    given = arguments.parse_args()
    columns = ("`--config`", "seed", "test images", "metric", "reached", "processor minutes", "trained again")
    print(f"| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")
    with tempfile.TemporaryDirectory() as folder:
        flags = []
        if given.name in SCENES:
            python("benchmarks/scenes.py", f"{folder}/scenes")
            flags = ["--data.source", f"{SCENES[given.name]}:{folder}/scenes"]
        for seed in given.seeds:
            is_first = seed == given.seeds[0]
            run = given.keep if is_first and given.keep else pathlib.Path(folder, str(seed))
            again = "-"
            minutes = trained(given.name, run, seed, flags)
            if is_first and given.again:
                trained(given.name, pathlib.Path(folder, "again"), seed, flags)
                again = "the same bits" if same_parameters(run, pathlib.Path(folder, "again")) else "other bits"
            images, metric, reached = evaluated(run, pathlib.Path(folder, "table.md"))
            cells = (f"`{given.name}`", str(seed), images, metric, reached, f"{minutes:.1f}", again)
            print(f"| {' | '.join(cells)} |", flush=True)


def python(*arguments: object) -> None:
    """A command of the repository. What it prints is not ours."""
    subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, stdout=sys.stderr, check=True)


def trained(name: str, run: pathlib.Path, seed: int, flags: list[str]) -> float:
    """Trains into a new folder; minutes of a processor."""
    shutil.rmtree(run, ignore_errors=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    python("train.py", "--config", name, "--run-dir", run.absolute(), "--seed", seed, *flags)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 60


def evaluated(run: pathlib.Path, table: pathlib.Path) -> tuple[str, str, str]:
    """Images, the name of the metric, and its value with the interval, of averaged weights."""
    from results import tables_in

    python("eval.py", run.absolute(), "--table", table)
    ((columns, *rows),) = tables_in(table.read_text())
    (row,) = [
        found for found in (dict(zip(columns, row, strict=True)) for row in rows) if found["weights"] == "averaged"
    ]
    metric = next(name for name in METRICS if name in row)
    return row["images"], metric, row[metric]


def same_parameters(one: pathlib.Path, other: pathlib.Path) -> bool:
    import numpy as np

    import tnt_jax
    from tnt_jax.storage.folder import model_parameters

    first, second = (model_parameters(tnt_jax.load_model(run)) for run in (one, other))
    return all(np.array_equal(first[name], second[name]) for name in first)


if __name__ == "__main__":
    main()
