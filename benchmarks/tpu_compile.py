"""What TNT-S costs on TPUs beside a ViT-S, by the compiler's own account: no TPU is needed.

    pip install -e '.[plan]'
    python benchmarks/tpu_compile.py [--topologies v5e:2x2 v6e:2x2] [--batch 128]
    python benchmarks/tpu_compile.py --topologies here

Every program is compiled by libtpu for one chip. Its cycles are the compiler's estimates of the fusions in the
optimised program, added up; a Pallas kernel hides its cycles from that estimate, and what is added for it are the
instruction bundles of its final schedule, each loop body as often as it runs, as if memory never made it wait. So these
are no measurements: they compare programs. The traffic of a kernel is counted, the words in and out.

There are two yardsticks: `stock` is a ViT-S/16 of Flax's own layers (benchmarks/stock_vit.py), `deit` one of the
layers of TNT (benchmarks/deit.py). `reference` is the straightforward port: words as (sentences, words, channels).
`train` is the gradient for all parameters in bfloat16, with stochastic depth, which `stock` has not. Images a second
are what these cycles take at the chip's clock, and MFU is what the model's own arithmetic has of the peak then. The
largest batch is what is left of the chip's memory beside the state of AdamW with an average of the parameters (20 bytes
each), divided by the temporary memory of an image: `python train.py --plan` compiles the whole step at it.

A device of a v5p has two cores, which share the steps of our kernels. Whether the compiler's estimates count one core
or both is not known, so its ratios may be wrong by two, and it is left out by default.

On a machine with an accelerator, `--topologies here` compiles for that, and runs: milliseconds and the share of peak.
"""

import argparse
import dataclasses
import json
import sys

import programs

YARDSTICKS = ("stock", "deit")
MODELS = (*YARDSTICKS, "reference", "feature_major", "pallas")
PASSES = ("forward", "train")
TOPOLOGIES = ("v5e:2x2", "v6e:2x2")
COLUMNS = ("over stock", "over deit", "images/s", "MFU", "HBM MB", "temporary MiB", "largest batch")
STATE_BYTES = 20  # of each parameter: itself, its average, two moments, its gradient


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--topologies", nargs="+", default=TOPOLOGIES)
    arguments.add_argument("--batch", type=int, default=128, help="images on the chip")
    arguments.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    arguments.add_argument("--remat", choices=("none", "linear", "all"), default="none", help="of TNT-S alone")
    arguments.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    given = arguments.parse_args()
    for topology in given.topologies:
        print(f"\n{topology}, one device, {given.batch} images, bfloat16; per image")
        columns = ["one device of", "pass", "model", "ms" if topology == "here" else "kilocycles", *COLUMNS]
        print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
        for which in given.passes:
            measured = {}
            for model in given.models:
                found = measured[model] = programs.child(__file__, topology, model, which, given.batch, given.remat)
                if "wanted" in found:
                    wanted = f"{found['wanted'] / 2**30:.1f} GiB" if found["wanted"] else "more than there is"
                    cells = [topology, which, model, f"does not fit: {wanted}", *["-"] * len(COLUMNS)]
                else:
                    found["spent"] = found["wall"] or programs.cycles(found, given.batch, topology)
                    cells = [topology, *_cells(which, model, measured, given.batch)]
                print(f"| {' | '.join(cells)} |", flush=True)


def _cells(which: str, model: str, measured: dict[str, dict], batch: int) -> list[str]:
    from tnt_jax.chips import chip_of

    found = measured[model]
    chip, seconds = chip_of(found["device"]), found["wall"]
    if chip and not seconds and chip.name in programs.CLOCK:
        seconds = found["spent"] / programs.CLOCK[chip.name]
    spent = found["spent"] * (1e3 if found["wall"] else 1e-3) / batch
    cells = [which, model, f"{spent:,.{0 if spent >= 100 else 1}f}"]
    for yardstick in YARDSTICKS:
        peer = measured.get(yardstick, {})
        cells.append(f"{found['spent'] / peer['spent']:.2f}" if "spent" in peer else "-")
    cells.append(f"{batch / seconds:,.0f}" if seconds else "-")
    cells.append(f"{found['flops'] / chip.flops / seconds:.0%}" if seconds and chip else "-")
    cells += [f"{found['traffic'] / batch / 1e6:.0f}", f"{found['temporary'] / batch / 2**20:.1f}"]
    left = chip.memory - STATE_BYTES * found["parameters"] if chip else 0
    cells.append(f"{left / found['temporary'] * batch:,.0f}" if which == "train" and chip else "-")
    return cells


def measure(topology: str, model: str, which: str, batch: int, remat: str) -> dict:
    import jax
    from networks import traced

    from tnt_jax.chips import training_flops
    from tnt_jax.models.summary import count_macs
    from tnt_jax.models.variants import model_config

    config = model_config(
        "tnt_s_patch16_224", dtype="bfloat16", inner=model if model in MODELS[2:] else "auto", remat=remat
    )
    if model == programs.ONE_BLOCK:
        config = dataclasses.replace(config, inner="pallas", depth=1)
    function, shapes = traced(model, config, batch, which)
    found = programs.account(function, shapes, topology)
    macs = count_macs(config)
    of_words = macs["words"] + macs["inner transformers"] + macs["words to sentences"] if model in YARDSTICKS else 0
    macs = sum(macs.values()) - of_words
    return found | {
        "flops": batch * (2 * macs if which == "forward" else training_flops(macs)),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes[0])),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        topology, model, which, batch, remat = sys.argv[2:]
        print(json.dumps(measure(topology, model, which, int(batch), remat)))
    else:
        main()
