"""What TNT-S costs on NVIDIA GPUs beside a ViT-S, by XLA's own account: no GPU is needed.

    pip install -e '.[plan-gpu]' nvidia-cudnn-cu13      (Python 3.12 and JAX 0.12 or newer, in their own environment)
    python benchmarks/gpu_compile.py [--cards h100] [--batch 128]

Every program is compiled for one card. **Nothing runs, and every time is an estimate**: the sum of those that XLA
writes beside the kernels of its program. Two checks of them: a DeiT-S with the numbers of an RTX 4090 was estimated at
1.4 times the time that timm publishes, TNT-S over DeiT-S at 1.9 where timm publishes 2.9. So ratios are good within a
factor of 1.5 and times within 2: they say which of two programs computes or moves more, and prove no gain of 20%.
XLA cannot see into custom calls. Added for ours are from what its instructions take at least to a guess of twice that
(benchmarks/gpu_kernels.py), or from its bytes; for cuDNN's attention a guess, 30 µs a layer forward and 75 for the
gradient. Bytes and temporary memory are the compiler's own, with the arguments and results of those calls added.

`stock` is a ViT-S of Flax's layers (stock_vit.py), `deit` a DeiT-S of ours. The others are a TNT-S by its formulation;
those in `+cudnn` have cuDNN's attention between sentences. `train` is the gradient for all parameters in bfloat16, with
stochastic depth. XLA has estimates for compute capability 9.0 and newer alone.
"""

import argparse
import collections
import json
import re
import sys
import time

import programs

MODELS = ("stock", "deit", "deit+cudnn", "auto", "reference", "feature_major", "cuda", "cuda+cudnn")
PASSES = ("forward", "train")
ESTIMATES = "--xla_gpu_collect_cost_model_stats=true --xla_gpu_experimental_cost_model_gemm_tiling_default=true"
NO_WORK = ("parameter", "bitcast", "constant", "get-tuple-element", "tuple")
# Microseconds a layer for 128 images on an H100, from what the instructions take at least to a guess.
OF_KERNEL = {"inner_forward": (23, 45), "inner_mlp_gradient": (44, 100), "inner_attention_gradient": (30, 70)}
OF_KERNEL["norm_gradient"] = (17, 35)  # bytes at the memory's peak, to a guess of twice that
OF_CUDNN = {"forward": 30, "train": 105}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--cards", nargs="+", default=("h100",))
    arguments.add_argument("--batch", type=int, default=128, help="images on the card")
    arguments.add_argument("--depth", type=int, default=12, help="blocks")
    arguments.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    arguments.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    arguments.add_argument(
        "--json", action="store_true", help="a line for each program, as benchmarks/gpu.py reads them"
    )
    given = arguments.parse_args()
    for card in given.cards:
        head = f"\n{card}, {given.batch} images, bfloat16, {given.depth} blocks; milliseconds are estimates"
        columns = ["ms", "over stock", "over DeiT-S with the same attention", "MB an image", "kernels"]
        columns += ["temporary MiB an image", "compiled in s"]
        head += "\n| | | " + " | ".join(columns) + " |" + "\n|" + "---|" * (2 + len(columns))
        if not given.json:
            print(head)
        for which in given.passes:
            seen = {}
            for model in given.models:
                flags = {"XLA_FLAGS": ESTIMATES} if has_estimates(card) else {}
                topology = f"{card}:1"
                seen[model] = programs.child(
                    __file__, topology, model, which, given.batch, given.depth, environment=flags
                )
                line = {"estimate": card, "model": model, "which": which} | seen[model]
                print(json.dumps(line) if given.json else _row(which, model, seen), flush=True)


def has_estimates(card: str) -> bool:
    from tnt_jax.planning.gpus import card_of

    return card_of(f"{card}:1")[0].capability >= 9


def _row(which: str, model: str, seen: dict[str, dict]) -> str:
    found = seen[model]
    least, most = (found[f"{end} us"] / 1e3 for end in ("least", "most"))
    cells = [which, model]
    if not found["estimated"]:
        cells += ["-"] * 3
    else:
        cells.append(f"{least:.2f}" if most == least else f"{least:.2f} to {most:.2f}")
        for yardstick in ("stock", "deit+cudnn" if model.endswith("+cudnn") else "deit"):
            over = seen.get(yardstick, {}).get("least us")
            ends = sorted({f"{end * 1e3 / over:.2f}" for end in (least, most)}) if over else ["-"]
            cells.append(" to ".join(ends))
    cells += [f"{found['bytes'] / found['batch'] / 1e6:.0f}", str(found["kernels"])]
    cells += [f"{found['temporary'] / found['batch'] / 2**20:.1f}", f"{found['seconds']:.0f}"]
    return f"| {' | '.join(cells)} |"


def estimates(program: str) -> tuple[int, float, collections.Counter]:
    """Of a compiled program: its kernels, the sum of their estimates in microseconds, and custom calls by name.

    A kernel has up to four estimates: one for products, one for Triton's fusions, and a general one, which is useless
    for those two.
    """
    kernels, total, calls = 0, 0.0, collections.Counter()
    for line in program[program.index("\nENTRY") :].splitlines():
        instruction = re.match(r"\s+(?:ROOT )?%\S+ = (?:\(.*?\)|\S+) ([\w-]+)\(", line)
        if not instruction or instruction[1] in NO_WORK:
            continue
        kernels += 1
        costs = {}
        for block in re.findall(r'"reification_cost":\[(.*?)\]', line):
            for item in re.findall(r"\{(.*?)\}", block):
                name = re.search(r'"name":"([^"]*)"', item)[1]
                costs[name] = float(re.search(r'"exec_time_us":"?([\d.e+-]+)', item)[1])
        wanted = ("experimental-gemm-cost-model", "indexing-cost-model", "")
        total += next((costs[name] for name in wanted if name in costs), 0.0)
        if called := re.search(r'custom_call_target="([^"]*)"', line):
            ours = re.search(r"\.entry (\w+)\(", line)
            calls[ours[1] if ours else called[1]] += 1
    return kernels, total, calls


def measure(topology: str, model: str, which: str, batch: int, depth: int) -> dict:
    import jax

    from tnt_jax.models.kernels.gpu.sizes import KERNELS
    from tnt_jax.planning.compiling import costs_of
    from tnt_jax.planning.gpus import gpu_devices
    from tnt_jax.training.mesh import make_mesh

    mesh = make_mesh(1, gpu_devices(topology))
    function, shapes, config = program_of(model, which, batch, depth)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), shapes)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = jax.jit(function).lower(*shapes).compile()
    seconds = time.perf_counter() - start
    kernels, total, calls = estimates(compiled.as_text())
    scale, cudnn = batch / 128, sum(count for name, count in calls.items() if "fmha" in name.lower())
    layers = cudnn if which == "forward" else cudnn / 2
    ends = [sum(OF_KERNEL[name][end] * calls[name] for name in OF_KERNEL) for end in (0, 1)]
    words = batch * 196 * 16 * config.inner_dim * 2
    moved = words * sum(calls[name] * (2 if name == "inner_forward" else 3) for name in KERNELS)
    moved += batch * 196 * config.outer_dim * 2 * 3 * calls["norm_gradient"]
    moved += batch * 200 * config.outer_dim * 2 * layers * (4 if which == "forward" else 12)
    return {
        "batch": batch,
        "estimated": total > 0,
        "least us": total + scale * (ends[0] + layers * OF_CUDNN[which]),
        "most us": total + scale * (ends[1] + layers * OF_CUDNN[which]),
        "kernels": kernels,
        "calls": calls,
        "bytes": costs_of(compiled).get("bytes accessed", 0) + moved,
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "seconds": seconds,
    }


def program_of(model: str, which: str, batch: int, depth: int) -> tuple:
    """A function, the shapes of its arguments, and the configuration of the TNT that it is or stands beside."""
    from networks import traced

    from tnt_jax.models.formulations import attention
    from tnt_jax.models.variants import model_config

    name, _, with_cudnn = model.partition("+")
    if not with_cudnn:
        attention.cudnn_obstacle = lambda layer: "not asked for"
    inner = "cuda" if with_cudnn else "auto" if name in ("stock", "deit") else name
    config = model_config("tnt_s_patch16_224", dtype="bfloat16", inner=inner, depth=depth)
    return *traced(name, config, batch, which), config


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        topology, model, which, batch, depth = sys.argv[2:]
        print(json.dumps(measure(topology, model, which, int(batch), int(depth))))
    else:
        main()
