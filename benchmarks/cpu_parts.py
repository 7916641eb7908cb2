"""Where the inference of a TNT-S spends a processor's time, by Linux's `perf`, and what XLA's YNNPACK does to it.

    python benchmarks/cpu_parts.py [--rounds 9]     with JAX 0.12 or newer

Shares of samples of processor time, so cores need not be idle; a program with YNNPACK and one without take turns.
"""

import argparse
import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
CASES = {"1, float32": (1, "float32"), "8, float32": (8, "float32"), "8, bfloat16": (8, "bfloat16")}
# The first whose pattern is in the library or the symbol of a sample.
PARTS = {
    "inner transformer, in C": r"inner_layer",
    "outer attention, in C": r"^attention",
    "matrix products, of YNNPACK": r"ynn::.*dot",
    "packing of their matrices": r"ynn::.*(transpose|pack)",
    "norms, GELU and residuals, of XLA": r"JIT|ynn::",
    "all else": r"",
}
WITHOUT = {"xla_cpu_experimental_ynn_fusion_type": ""}
SECONDS = 5  # of samples


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=9)
    given = arguments.parse_args()
    found = {}
    for case in CASES:
        command = [sys.executable, __file__, "--child", case, str(given.rounds)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found[case] = json.loads(done.stdout.splitlines()[-1])
    print("| batch, dtype | " + " | ".join(CASES) + " |\n|" + "---|" * (len(CASES) + 1))
    for row in next(iter(found.values())):
        print(f"| {row} | " + " | ".join(found[case][row] for case in CASES) + " |")


def child(batch: int, dtype: str, rounds: int) -> dict[str, str]:
    import jax
    import numpy as np
    from flax import nnx

    from tnt_jax import create_model
    from tnt_jax.commands.process import keep_memory

    keep_memory()  # as train.py does
    graphdef, params = nnx.split(create_model("tnt_s_patch16_224", seed=0, dtype=dtype))
    images = jax.device_put(np.random.default_rng(0).standard_normal((batch, 224, 224, 3), np.float32))
    lowered = jax.jit(lambda params, images: nnx.merge(graphdef, params)(images)).lower(params, images)
    programs = [lowered.compile(), lowered.compile(compiler_options=WITHOUT)]
    spent = []
    for _ in range(rounds + 1):
        spent.append([])
        for program in programs:
            began = time.process_time()
            program(params, images).block_until_ready()
            spent[-1].append(time.process_time() - began)
    spent = spent[1:]
    shares = sampled(lambda: programs[0](params, images).block_until_ready())
    return shares | {
        "ms of a processor": f"{1e3 * statistics.median(own for own, _ in spent):.0f}",
        "without YNNPACK, over this": f"{statistics.median(other / own for own, other in spent):.2f}",
    }


def sampled(call) -> dict[str, str]:
    """The share of each part in the samples of some seconds of calls."""
    with tempfile.TemporaryDirectory() as folder:
        samples = f"{folder}/samples"
        record = ["perf", "record", "-q", "-e", "cpu-clock", "-F", "999", "-o", samples, "-p", str(os.getpid())]
        perf = subprocess.Popen(record, stderr=subprocess.DEVNULL)
        time.sleep(1)
        began = time.process_time()
        while time.process_time() - began < SECONDS:
            call()
        perf.send_signal(signal.SIGINT)
        perf.wait()
        report = ["perf", "report", "-i", samples, "--stdio", "-F", "overhead,dso,symbol", "-t", ";"]
        lines = subprocess.run(report, capture_output=True, text=True, check=True).stdout.splitlines()
    shares = dict.fromkeys(PARTS, 0.0)
    for line in lines:
        if found := re.match(r"\s*([\d.]+)%\s*;(.*)", line):
            shares[next(part for part, pattern in PARTS.items() if re.search(pattern, found[2]))] += float(found[1])
    return {part: f"{share:.1f}%" for part, share in shares.items()}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(*CASES[sys.argv[2]], int(sys.argv[3]))))
    else:
        main()
