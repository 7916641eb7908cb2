"""What TNT-S costs on TPUs beside a ViT-S, by the compiler's own account: no TPU is needed.

    pip install -e '.[plan]'
    python benchmarks/tpu_compile.py [--topologies v5e:2x2 v5p:2x2x1 v6e:2x2 tpu7x:2x2x1] [--batch 128]
    python benchmarks/tpu_compile.py --topologies here

Every program is compiled by libtpu for one chip. Its cycles are the compiler's estimates of the fusions in the
optimised program, added up; a Pallas kernel hides its cycles from that estimate, and what is added for it are the
instruction bundles of its final schedule, each loop body as often as it runs, as if memory never made it wait. So these
are no measurements: they compare programs. The traffic of a kernel is counted, the words in and out.

There are two yardsticks, and every ratio is over the cheaper one of that pass: `stock` is a ViT-S/16 of Flax's own
layers (benchmarks/stock_vit.py), `deit` one of the layers of TNT (benchmarks/deit.py). `reference` is the
straightforward port: words as (sentences, words, channels). `train` is the gradient for all parameters in bfloat16,
with stochastic depth, which `stock` has not. The largest batch is what is left of the chip's memory beside the state
of AdamW with an average of the parameters (20 bytes each), divided by the temporary memory of an image: `python
train.py --plan` compiles the whole step at it.

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
TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
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
        unit = "ms" if topology == "here" else "kilocycles"
        print(f"\n{topology}, one device, {given.batch} images, bfloat16; per image")
        columns = [unit, "over the yardstick", "HBM MB", "over it", "temporary MiB", "largest batch", "compiled in s"]
        print("| | | " + " | ".join(columns) + " |" + "\n|" + "---|" * (2 + len(columns)))
        for which in given.passes:
            measured = {}
            for model in given.models:
                found = measured[model] = programs.child(__file__, topology, model, which, given.batch, given.remat)
                if "wanted" not in found:
                    found["spent"] = found["wall"] or programs.cycles(found, given.batch, topology)
            fitting = {model: found for model, found in measured.items() if "spent" in found}
            peers = [fitting[model] for model in YARDSTICKS if model in fitting] or list(fitting.values())[:1]
            yardstick = min(peers, key=lambda found: found["spent"], default=None)
            for model, found in measured.items():
                if model in fitting:
                    print(_row(which, model, found, yardstick, given.batch), flush=True)
                    continue
                wanted = f"{found['wanted'] / 2**30:.1f} GiB" if found["wanted"] else "more than there is"
                print(f"| {which} | {model} | does not fit: {wanted} |" + " |" * (len(columns) - 1), flush=True)


def _row(which: str, model: str, found: dict, yardstick: dict, batch: int) -> str:
    from tnt_jax.chips import chip_of

    chip = chip_of(found["device"])
    spent = found["spent"] * 1e3 if found["wall"] else found["spent"] / 1e3
    cells = [which, model, f"{spent / batch:.3g}", f"{found['spent'] / yardstick['spent']:.2f}"]
    if found["wall"] and chip:
        cells[2] += f" ({found['flops'] / chip.flops / found['wall']:.0%} of peak)"
    cells += [f"{found['traffic'] / batch / 1e6:.0f}", f"{found['traffic'] / yardstick['traffic']:.2f}"]
    cells.append(f"{found['temporary'] / batch / 2**20:.1f}")
    left = chip.memory - STATE_BYTES * found["parameters"] if chip else 0
    cells.append(f"{left / found['temporary'] * batch:.0f}" if which == "train" and chip else "-")
    cells.append(f"{found['seconds']:.0f}")
    return f"| {' | '.join(cells)} |"


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
