"""The first prediction of a fresh process, with JAX's cache of compiled programs and without.

    python benchmarks/first_prediction.py [--rounds 3]

A TNT-S of 224 pixels and one image. Seconds of a processor, medians of fresh processes: compiling runs on one thread,
so on idle cores it takes as long. The cache was filled by a process before.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile

CALLS = (
    "model(images)",
    "nnx.jit(lambda model, images: model(images))(model, images)",
    "tnt_jax.inference_model(model, np.asarray(images[0]))",
)
CHILD = """
import time
import jax, numpy as np, tnt_jax
from flax import nnx
model = tnt_jax.create_model("tnt_s_patch16_224", num_classes=10, seed=0)
images = jax.device_put(np.zeros((1, 224, 224, 3), np.float32))
began = time.process_time()
jax.block_until_ready({call})
print(time.process_time() - began)
"""


def seconds_of(call: str, settings: dict[str, str]) -> float:
    """Of the processor, for the first such call of a process."""
    command = [sys.executable, "-c", CHILD.format(call=call)]
    done = subprocess.run(command, env=os.environ | settings, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=3)
    given = arguments.parse_args()
    print("| first prediction, s of a processor | no cache | from the cache |\n|---|---|---|")
    for call in CALLS:
        with tempfile.TemporaryDirectory() as folder:
            cache = {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
            seconds_of(call, cache)
            medians = [
                statistics.median(seconds_of(call, settings) for _ in range(given.rounds)) for settings in ({}, cache)
            ]
        print(f"| `{call}` | {medians[0]:.1f} | {medians[1]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
