"""What TNT-S costs on TPUs beside DeiT-S, by the compiler's own account: no TPU is needed.

    pip install -e '.[plan]'
    python benchmarks/tpu_compile.py [--topology v5e:2x2] [--batch 32] [--depth 12]

Every program is compiled by libtpu for one chip. Its cycles are the compiler's estimates of the fusions in the
optimised program, added up; a Pallas kernel hides its cycles from that estimate, and what is added for it are the
instruction bundles of its final schedule, each loop body as often as it runs, as if memory never made it wait. So these
are no measurements: they compare programs. The DeiT-S is made of the same layers (benchmarks/deit.py).

With --depth less than 12 a program has fewer blocks, and is compiled sooner; what is printed is then scaled to 12 by
the difference between that depth and half of it.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
MODELS = ("deit", "reference", "feature_major", "pallas")
PASSES = ("forward", "train")
FULL_DEPTH = 12


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--topology", default="v5e:2x2")
    arguments.add_argument("--batch", type=int, default=32, help="images on the chip")
    arguments.add_argument("--depth", type=int, default=FULL_DEPTH)
    arguments.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    given = arguments.parse_args()
    print(f"{given.topology}, one chip, {given.batch} images, bfloat16, {FULL_DEPTH} blocks; per image")
    print("| | | kcycles | over DeiT-S | HBM MB | over DeiT-S | temporary MiB | compiled in s |")
    print("|---|---|---|---|---|---|---|---|")
    for which in PASSES:
        yardstick = None
        for model in given.models:
            found = _at_full_depth(model, which, given)
            yardstick = yardstick or found
            ratios = {name: f"{found[name] / yardstick[name]:.2f}" for name in ("cycles", "traffic")}
            cells = [which, model, f"{found['cycles'] / 1e3:.0f}", ratios["cycles"], f"{found['traffic'] / 1e6:.0f}"]
            cells += [ratios["traffic"], f"{found['temporary'] / 2**20:.1f}", f"{found['seconds']:.0f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


def _at_full_depth(model: str, which: str, given: argparse.Namespace) -> dict[str, float]:
    deep = _child(model, which, given.topology, given.batch, given.depth)
    if given.depth == FULL_DEPTH:
        return deep
    shallow = _child(model, which, given.topology, given.batch, given.depth // 2)
    steps = (FULL_DEPTH - given.depth) / (given.depth - given.depth // 2)
    return {name: deep[name] + steps * (deep[name] - shallow[name]) for name in deep} | {"seconds": deep["seconds"]}


def _child(model: str, which: str, topology: str, batch: int, depth: int) -> dict[str, float]:
    sys.path.insert(0, str(ROOT))
    from tnt_jax.plan import environment_for

    with tempfile.TemporaryDirectory() as dump:
        environment = os.environ | environment_for(topology) | {"PYTHONPATH": str(ROOT)}
        environment["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        command = [sys.executable, __file__, "--child", model, which, topology, str(batch), str(depth), dump]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(model: str, which: str, topology: str, batch: int, depth: int, dump: str) -> dict[str, float]:
    import jax
    import jax.numpy as jnp
    from deit import DeiT
    from flax import nnx
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    from tnt_jax.config import ModelConfig
    from tnt_jax.models.layers import InitialRngs
    from tnt_jax.models.variants import abstract_model, resolve
    from tnt_jax.training.mesh import make_mesh

    mesh = make_mesh(1, topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[:1])
    config = ModelConfig(dtype="bfloat16", depth=depth, inner=None if model == "deit" else model)
    network = DeiT(resolve(config), rngs=InitialRngs(None)) if model == "deit" else abstract_model(config)
    graphdef, params = nnx.split(network)
    images = jax.ShapeDtypeStruct((batch, *resolve(config).image_size, 3), jnp.bfloat16)

    def forward(params, images, key=None):
        return nnx.merge(graphdef, params)(images, key)

    def train(params, images, seed):
        key = jax.random.wrap_key_data(seed)
        return jax.grad(lambda params: jax.nn.logsumexp(forward(params, images, key), axis=-1).sum())(params)

    shapes = (params, images) if which == "forward" else (params, images, jax.ShapeDtypeStruct((2,), jnp.uint32))
    whole = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), shapes)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = jax.jit({"forward": forward, "train": train}[which]).lower(*shapes).compile()
    program = compiled.as_text()
    estimated = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', program)))
    tiles = -(-batch * 196 // 1024)
    words = 16
    calls = {name: len(re.findall(rf"%{name}[.\d]* = .*custom-call", program)) for name in kernels(dump)}
    scheduled = sum(calls[name] * tiles * bundles(path, words) for name, path in kernels(dump).items())
    return {
        "cycles": (estimated + scheduled) / batch,
        "traffic": compiled.cost_analysis()["bytes accessed"] / batch,
        "temporary": compiled.memory_analysis().temp_size_in_bytes / batch,
        "seconds": time.perf_counter() - start,
    }


def kernels(dump: str) -> dict[str, pathlib.Path]:
    """The final schedule of each Pallas kernel by its name."""
    found = {}
    for path in pathlib.Path(dump).glob("*-final_bundles.txt"):
        name = re.search(r"(inner_block|words_to_sentence)_(forward|backward)", path.name)
        if name and "schedule-analysis" not in path.name:
            found[name[0]] = path
    return found


def bundles(path: pathlib.Path, words: int) -> int:
    """Instruction bundles of one tile: those of the loops within it run once for every word."""
    count = 0
    for line in path.read_text().splitlines():
        if bundle := re.match(r"\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2}:)?\s*:?\s*([>\s]*)\{", line):
            count += words if bundle[1].count(">") >= 2 else 1
    return count


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        model, which, topology, batch, depth, dump = sys.argv[2:]
        print(json.dumps(measure(model, which, topology, int(batch), int(depth), dump)))
    else:
        main()
