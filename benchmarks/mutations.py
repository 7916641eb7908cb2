"""Thousands of damaged and hostile checkpoints: how many are refused with a message, and how many are read right.

    python benchmarks/mutations.py [--seeds 3000] [--first 0]

Each is in a file of its own; another error, a wrong number or more than ten seconds ends the program with its seed.
"""

import argparse
import collections
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def main() -> None:
    import numpy as np
    from mutations import mutated, originals, outcome
    from small_models import small_model

    from tnt_jax.storage.folder import model_parameters

    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seeds", type=int, default=3000)
    arguments.add_argument("--first", type=int, default=0)
    given = arguments.parse_args()
    model = small_model()
    expected = {name: np.asarray(value) for name, value in model_parameters(model).items()}
    counted, slowest = collections.Counter(), 0.0
    with tempfile.TemporaryDirectory() as folder:
        files = originals(model, Path(folder))
        os.mkdir(os.path.join(folder, "here"))
        os.chdir(os.path.join(folder, "here"))
        for seed in range(given.first, given.first + given.seeds):
            kind, what, content = mutated(seed, files)
            path = Path(folder) / "mutated"
            path.write_bytes(content)
            started = time.perf_counter()
            try:
                counted[kind, what, outcome(path, kind, expected)] += 1
            except BaseException:
                print(f"seed {seed}: {kind}, {what}", file=sys.stderr)
                raise
            slowest = max(slowest, time.perf_counter() - started)
        written = os.listdir(".")
        os.chdir(ROOT)
    print("| file | mutation | refused | read right |\n|---|---|---|---|")
    for kind, what in sorted({key[:2] for key in counted}):
        print(f"| {kind} | {what} | {counted[kind, what, 'refused']} | {counted[kind, what, 'right']} |")
    print(f"slowest {slowest:.2f} s; files written elsewhere: {len(written)}")


if __name__ == "__main__":
    main()
