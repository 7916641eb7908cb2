"""What the compiler says of a program for a TPU that is not there, and how long a program takes where it can run."""

import functools
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from tnt_jax.planning.compiling import memory_wanted
from tnt_jax.planning.plan import environment_for

ROOT = pathlib.Path(__file__).resolve().parents[1]
KERNELS = r"(inner_block|words_to_sentence|outer_layer)_(forward|backward)"
TILE = 1024  # sentences that a kernel of words takes at a time
IMAGES = 4  # that a kernel of tokens takes at a time, and how often the loop within it runs
CORES = {"v5p": 2, "v4": 2}  # of a device; they share the steps of a kernel
CLOCK = {"TPU v5e": 1.5e9, "TPU v5p": 1.75e9, "TPU v6e": 1.75e9}  # from their peaks and the sizes of their matrix units
ONE_BLOCK = "block"  # to tpu_compile.py, a TNT-S of one block, from which the schedules are read
ROUNDS = 5


def child(script: str, topology: str, *arguments: object, environment: dict[str, str] | None = None) -> dict:
    """The answer of `script --child`, a process that compiles for a topology, or for this machine ("here").

    JAX has to be told about its devices before it starts, so each has a process of its own.
    """
    settings = {} if topology == "here" else environment_for(topology)
    settings |= {"PYTHONPATH": str(ROOT)} | (environment or {})
    command = [sys.executable, script, "--child", topology, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | settings, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def device(topology: str):
    """The first device of a topology; of this machine if it is "here"."""
    import jax
    from jax.experimental import topologies

    if topology == "here":
        return jax.devices()[0]
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]


def account(function: Callable, shapes: tuple, topology: str, *, free_layouts: bool = False) -> dict:
    """A program compiled for one device: `cycles` that XLA estimates, `calls` of our kernels, which it cannot see into,
    bytes of HBM `traffic` and of `temporary` memory, compile `seconds`, and where it can run, the `wall` time.

    Of a program that does not fit, `wanted` alone: the bytes that it would take, or None.
    With `free_layouts`, arrays come and go in the layouts that suit the program, as within a larger one.
    """
    import jax
    from jax.experimental.layout import Format, Layout
    from jax.sharding import NamedSharding, PartitionSpec

    from tnt_jax.training.mesh import make_mesh

    mesh = make_mesh(1, [device(topology)])
    whole = NamedSharding(mesh, PartitionSpec())
    formats = {"in_shardings": Format(Layout.AUTO, whole), "out_shardings": Format(Layout.AUTO, whole)}
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), shapes)
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = jax.jit(function, **formats if free_layouts else {}).lower(*shapes)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return {"wanted": memory_wanted(str(error))}
    seconds, program = time.perf_counter() - start, compiled.as_text()
    called = re.findall(rf"%({KERNELS})[.\d]* = .*custom-call", program)
    return {
        # The compiler says 2^63 - 1 of what it cannot estimate: on a v7x a copy in the stem, 3 kilocycles elsewhere.
        "cycles": sum(c for c in map(int, re.findall(r'"estimated_cycles":"(\d+)"', program)) if c < 2**62),
        "calls": {name: [found[0] for found in called].count(name) for name in {found[0] for found in called}},
        "traffic": compiled.cost_analysis()["bytes accessed"],
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "seconds": seconds,
        "wall": wall_time(compiled, shapes) if topology == "here" else None,
        "device": mesh.devices.flat[0].device_kind,
    }


def wall_time(compiled: Callable, shapes: tuple) -> float:
    """Seconds of a call, the median of a few rounds."""
    import jax
    import jax.numpy as jnp

    def ones(leaf, form):
        return jax.device_put(jnp.ones(leaf.shape, leaf.dtype), form)

    arrays = jax.tree.map(ones, shapes, compiled.input_formats[0])
    jax.block_until_ready(compiled(*arrays))
    rounds = []
    for _ in range(ROUNDS):
        start, calls = time.perf_counter(), 0
        while calls < 3 or time.perf_counter() - start < 0.3:
            jax.block_until_ready(compiled(*arrays))
            calls += 1
        rounds.append((time.perf_counter() - start) / calls)
    return statistics.median(rounds)


def cycles(found: dict, images: int, topology: str) -> float:
    """XLA's estimate, and for each call of a kernel its schedule, once for each tile of sentences or for each image."""
    which = "train" if any("backward" in name for name in found["calls"]) else "forward"
    scheduled = schedules(topology, which) if found["calls"] else {}
    steps = {name: -(-images // IMAGES) if name.startswith("outer") else -(-196 * images // TILE) for name in scheduled}
    if cores := CORES.get(topology.partition(":")[0]):
        steps |= {name: -(-count // cores) for name, count in steps.items()}
    return found["cycles"] + sum(calls * steps[name] * scheduled[name] for name, calls in found["calls"].items())


@functools.cache
def schedules(topology: str, which: str) -> dict[str, int]:
    """Instruction bundles of each kernel for one step: those of the loops within it run once for every word, or image.

    They are read from libtpu's final program of a network of one block, as if memory never made it wait.
    """
    with tempfile.TemporaryDirectory() as dump:
        flags = {"LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"}
        child(str(ROOT / "benchmarks/tpu_compile.py"), topology, ONE_BLOCK, which, 32, "none", environment=flags)
        found = {}
        for path in pathlib.Path(dump).glob("*-final_bundles.txt"):
            name = re.search(KERNELS, path.name)
            if name and "schedule-analysis" not in path.name:
                found[name[0]] = _bundles(path)
    return found


def _bundles(path: pathlib.Path) -> int:
    """A loop within a kernel runs as often as its exit test says; the one over images, whose number is only known when
    it runs, once for each image of a step."""
    count = within = 0
    turns = IMAGES
    for line in path.read_text().splitlines():
        if not (bundle := re.match(r"\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2}:)?\s*:?\s*([>\s]*)\{", line)):
            continue
        is_inner = bundle[2].count(">") >= 2
        if within and (not is_inner or bundle[1] == "LB:"):
            count, within, turns = count + within * turns, 0, IMAGES
        if is_inner and (test := re.search(r"scmp\.ge\.s32\.totalorder \S+, (\d+) /\* loop exit test", line)):
            turns = int(test[1])
        count, within = (count, within + 1) if is_inner else (count + 1, within)
    return count
