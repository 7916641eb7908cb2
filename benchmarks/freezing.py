"""The time of a training step with nine of twelve blocks frozen over that of the whole, in turns.

    python benchmarks/freezing.py [--rounds 5] [--batch 8]

A TNT-S of 224 pixels on this machine's devices; the published optimizer, no augmentation of the images.
"""

import argparse
import dataclasses
import statistics
import time

import jax
import numpy as np
from flax import nnx

from tnt_jax.config import DataConfig, ModelChanges, TrainConfig
from tnt_jax.models.variants import build_model, complete
from tnt_jax.training.mesh import make_mesh, to_devices
from tnt_jax.training.program import Program

EMBEDDING = ("word_embedding", "word_positions", "sentence_embedding", "class_token", "sentence_positions")
FROZEN = {"the whole": (), "nine of twelve blocks frozen": (*EMBEDDING, "blocks.0-8"), "the head": ("all-but-head",)}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--batch", type=int, default=8)
    given = arguments.parse_args()
    model = ModelChanges("tnt_s_patch16_224")
    config = TrainConfig(model=model, data=DataConfig.plain("synthetic"), batch_size=given.batch)
    config, mesh = complete(config, 1000), make_mesh()
    batch = {
        "image": np.random.default_rng(0).integers(0, 256, (given.batch, 224, 224, 3), np.uint8),
        "label": np.arange(given.batch, dtype=np.int32),
    }
    batch = to_devices(batch, mesh)
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(build_model(config.model, 0))))
    programs = {
        name: Program(dataclasses.replace(config, freeze=freeze), mesh, steps_per_epoch=100)
        for name, freeze in FROZEN.items()
    }
    states = {name: program.init(params) for name, program in programs.items()}
    seconds = {name: [] for name in programs}
    for turn in range(given.rounds + 1):
        for name, program in programs.items():
            began = time.perf_counter()
            states[name], metrics = program.train_step(states[name], batch)
            jax.block_until_ready((states[name], metrics))
            if turn:  # the first is compiled
                seconds[name].append(time.perf_counter() - began)
    print("| | ms a step | over the whole | MB of state |\n|---|---|---|---|")
    for name, program in programs.items():
        ratios = [own / whole for own, whole in zip(seconds[name], seconds["the whole"], strict=True)]
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.abstract_state)) / 1e6
        print(
            f"| {name} | {1e3 * statistics.median(seconds[name]):.0f} | {statistics.median(ratios):.2f} | {size:.0f} |"
        )


if __name__ == "__main__":
    main()
