"""Opening TNT-B's checkpoint of torch.save: this package's reader beside PyTorch's, each in its own process, in turns.

    python benchmarks/pth.py [--repeats 9]

Ours verifies the checksum of every tensor, which PyTorch does not; `touched` reads every value after that. Memory is
what the process has at its peak beyond what it had before, over the size of the file; pages of a mapped file count.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np

ONE = """
import json, sys, time
from pathlib import Path
path, how = Path(sys.argv[1]), sys.argv[2]
if how == "ours":
    from tnt_jax.storage.torch.pth import read_pth, Tensor
else:
    import torch
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
before, start = peak(), time.perf_counter()
if how == "ours":
    tensors = {name: tensor.numpy() for name, tensor in read_pth(path)["state_dict"].items()}
else:
    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=how == "mmap")["state_dict"]
opened = time.perf_counter() - start
if how != "ours":
    tensors = {name: tensor.numpy() for name, tensor in loaded.items()}
sum(float(tensor.sum()) for tensor in tensors.values())
touched = time.perf_counter() - start
print(json.dumps([opened, touched, peak() - before]))
"""
READERS = {"ours": "tnt_jax", "load": "torch.load", "mmap": "torch.load(mmap=True)"}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--repeats", type=int, default=9)
    repeats = arguments.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tnt_b.pth"
        _write(path)
        size = path.stat().st_size
        measured = {how: [] for how in READERS}
        for _ in range(repeats):
            for how, values in measured.items():
                command = [sys.executable, "-c", ONE, str(path), how]
                values.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    print(f"{size:,} bytes, medians (and extremes) of {repeats} in turns")
    print("| reader | opened, ms | touched, ms | memory / file |\n|---|---|---|---|")
    for how, values in measured.items():
        opened, touched, memory = zip(*values, strict=True)
        times = [f"{1e3 * median(t):.0f} ({1e3 * min(t):.0f} to {1e3 * max(t):.0f})" for t in (opened, touched)]
        print(f"| {READERS[how]} | {times[0]} | {times[1]} | {median(memory) / size:.2f} |")


def _write(path: Path) -> None:
    import torch

    from tnt_jax.models.variants import model_config
    from tnt_jax.storage.folder import parameter_shapes
    from tnt_jax.storage.torch.layouts import layout_shapes

    shapes = {name: of.shape for name, of in parameter_shapes(model_config("tnt_b_patch16_224")).items()}
    rng = np.random.default_rng(0)
    tensors = {
        name: torch.tensor(rng.standard_normal(shape, np.float32))
        for name, shape in layout_shapes(shapes, "huawei").items()
    }
    torch.save({"epoch": 300, "state_dict": tensors}, path)


if __name__ == "__main__":
    main()
