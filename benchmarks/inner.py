"""The inner branch alone: the inner transformer and words to sentence of a TNT-S block, in every formulation.

    pip install -e '.[plan]'
    python benchmarks/inner.py [--topology v5e:2x2] [--batch 128]
    python benchmarks/inner.py --topology here

For a TPU that is not there it prints kilocycles of an image, XLA's estimate and the kernels' schedules; for the machine
it runs on ("here"), the time of an image. Beside them stands the floor: what the arithmetic takes at the chip's peak,
or reading the words and writing words and sentences at its bandwidth, whichever is more. The gradient reads and writes
twice as much, and computes three times as much. bfloat16; on CPUs float32, where no floor is known.
"""

import argparse
import dataclasses
import json
import sys

import programs

FORMULATIONS = ("reference", "native", "feature_major", "pallas")
PASSES = ("forward", "gradient")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--topology", default="v5e:2x2")
    arguments.add_argument("--batch", type=int, default=128, help="images on the device")
    arguments.add_argument("--formulations", nargs="+", choices=FORMULATIONS, help="those that can run there")
    given = arguments.parse_args()
    formulations = given.formulations or _that_can_run(given.topology)
    unit = "µs" if given.topology == "here" else "kilocycles"
    print(f"{given.topology}, {given.batch} images, one block of TNT-S; {unit} of an image")
    print("| pass | formulation | " + unit + " | floor | of the floor | HBM MB | temporary MiB |")
    print("|---|---|---|---|---|---|---|")
    for which in PASSES:
        for formulation in formulations:
            found = programs.child(__file__, given.topology, formulation, which, given.batch)
            print(_row(which, formulation, found, given), flush=True)


def _that_can_run(topology: str) -> tuple[str, ...]:
    import jax

    kind = jax.default_backend() if topology == "here" else "tpu"
    impossible = {"cpu": {"pallas"}, "gpu": {"native", "pallas"}, "tpu": {"native"}}[kind]
    return tuple(each for each in FORMULATIONS if each not in impossible)


def _row(which: str, formulation: str, found: dict, given: argparse.Namespace) -> str:
    from tnt_jax.chips import chip_of

    chip = chip_of(found["device"])
    if given.topology == "here":
        spent, scale = found["wall"], 1e6
    else:
        spent, scale = programs.cycles(found, given.batch, given.topology), 1e-3
    floor = None
    if chip:
        floor = max(found["flops"] / chip.flops, found["least traffic"] / chip.bandwidth)
        floor *= 1 if given.topology == "here" else programs.CLOCK[chip.name]
    cells = [which, formulation, f"{spent * scale / given.batch:.2f}"]
    cells += [f"{floor * scale / given.batch:.2f}", f"{spent / floor:.1f}"] if floor else ["-", "-"]
    cells += [f"{found['traffic'] / given.batch / 1e6:.2f}", f"{found['temporary'] / given.batch / 2**20:.2f}"]
    return f"| {' | '.join(cells)} |"


def measure(topology: str, formulation: str, which: str, batch: int) -> dict:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from tnt_jax.models.layers import ABSTRACT
    from tnt_jax.models.summary import count_macs
    from tnt_jax.models.tnt import Block
    from tnt_jax.models.variants import model_config

    on_cpu = topology == "here" and jax.default_backend() == "cpu"
    config = model_config("tnt_s_patch16_224", dtype="float32" if on_cpu else "bfloat16", inner=formulation)
    block = Block(0.1, has_inner=True, config=config, rngs=ABSTRACT)
    graphdef, params = nnx.split((block.inner, block.words_to_sentence))
    patches = 196 * batch
    dtype = jnp.dtype(config.dtype)
    words = jax.ShapeDtypeStruct((patches, config.inner_dim * 16), dtype)
    sentences = jax.ShapeDtypeStruct((batch, 196, config.outer_dim), dtype)

    def forward(params, words, seed=None):
        inner, words_to_sentence = nnx.merge(graphdef, params)
        key = None if seed is None else jax.random.wrap_key_data(seed)
        words = inner(words.reshape(patches, 16, -1), key)
        words, sentences = words_to_sentence(words, batch=batch)
        return words.reshape(patches, -1), sentences

    def gradient(params, words, seed, slopes):
        out, backward = jax.vjp(lambda params, words: forward(params, words, seed), params, words)
        return out, backward(slopes)

    shapes = (params, words)
    if which == "gradient":
        shapes = (*shapes, jax.ShapeDtypeStruct((2,), jnp.uint32), (words, sentences))
    found = programs.account({"forward": forward, "gradient": gradient}[which], shapes, topology, free_layouts=True)
    macs = count_macs(dataclasses.replace(config, num_classes=1))
    of_a_block = (macs["inner transformers"] + macs["words to sentences"]) / config.depth
    moved = (2 * words.size + sentences.size) * dtype.itemsize
    times = 1 if which == "forward" else 3
    return found | {"flops": 2 * times * batch * of_a_block, "least traffic": moved * (1 if which == "forward" else 2)}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        topology, formulation, which, batch = sys.argv[2:]
        print(json.dumps(measure(topology, formulation, which, int(batch))))
    else:
        main()
