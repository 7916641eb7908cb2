"""A model in ONNX Runtime, float32 and int8: top-1 and bytes, and images a second on a CPU beside our own float32.

    python benchmarks/int8.py runs/digits [--batch 1 8] [--rounds 5]
    python benchmarks/int8.py runs/digits --rounds 0      without the times

int8 is fast where the processor has 8-bit products (AVX512-VNNI and the like); what a file spends outside of its matrix
products does not become faster. `--profile` prints where ONNX Runtime's time goes, by kind of operator.
"""

import argparse
import collections
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import onnxruntime

import tnt_jax
from tnt_jax.export.formats import logits_of

ROOT = pathlib.Path(__file__).resolve().parents[1]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model")
    arguments.add_argument("--batch", type=int, nargs="+", default=(1, 8))
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--profile", action="store_true")
    given = arguments.parse_args()
    model = tnt_jax.load_model(given.model)
    with tempfile.TemporaryDirectory() as folder:
        files = {"ONNX Runtime": f"{folder}/float32.onnx", "ONNX Runtime, int8": f"{folder}/int8.onnx"}
        for file, flags in zip(files.values(), ((), ("--quantize", "int8")), strict=True):
            command = [sys.executable, ROOT / "export.py", given.model, "--format", "onnx", "--out", file, *flags]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        report = json.loads(pathlib.Path(f"{files['ONNX Runtime, int8']}.json").read_text())["quantization"]
        print(f"| file | top-1 in percent ({report['measured_on']}) | bytes |\n|---|---|---|")
        for name, file in files.items():
            top1 = report["top1_int8" if "int8" in name else "top1_float32"]
            print(f"| {name} | {100 * top1:.2f} | {pathlib.Path(file).stat().st_size:,} |")
        run = {name: session(file) for name, file in files.items()} | {"ours": jax.jit(logits_of(model))}
        if given.rounds:
            print("\n| batch | " + " | ".join(f"{name}, images/s" for name in run) + " | int8 over float32 |")
            print("|---" * (len(run) + 2) + "|")
            for batch in given.batch:
                print(row(run, batch, given.rounds, (*model.config.image_size, model.config.in_channels)), flush=True)
        if given.profile:
            for name, file in files.items():
                print(f"{name}: {profile(file, model)}")


def session(file: str):
    opened = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda pixels: opened.run(None, {"pixels": pixels})[0]


def row(run: dict, batch: int, rounds: int, shape: tuple) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (batch, *shape), np.uint8)
    seconds = {name: [] for name in run}
    for compute in run.values():
        np.asarray(compute(pixels))
    for _ in range(rounds):
        for name, compute in run.items():
            calls, started = 0, time.perf_counter()
            while calls < 3 or time.perf_counter() - started < 0.5:
                np.asarray(compute(pixels))
                calls += 1
            seconds[name].append((time.perf_counter() - started) / calls)
    ratios = [a / b for a, b in zip(seconds["ONNX Runtime"], seconds["ONNX Runtime, int8"], strict=True)]
    rates = " | ".join(f"{batch / statistics.median(each):,.1f}" for each in seconds.values())
    return f"| {batch} | {rates} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"


def profile(file: str, model) -> str:
    """The share of the time of each kind of operator, over five batches of 8."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, file
    opened = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    pixels = np.zeros((8, *model.config.image_size, model.config.in_channels), np.uint8)
    for _ in range(5):
        opened.run(None, {"pixels": pixels})
    times = collections.Counter()
    for event in json.loads(pathlib.Path(opened.end_profiling()).read_text()):
        if event.get("cat") == "Node":
            times[event["args"].get("op_name")] += event["dur"]
    return ", ".join(f"{kind} {time / times.total():.0%}" for kind, time in times.most_common(8))


if __name__ == "__main__":
    main()
