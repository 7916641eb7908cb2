"""What NVIDIA's compiler makes of the CUDA kernels: registers, spilled bytes, and instructions for a sentence.

    pip install nvidia-cuda-nvrtc nvidia-cuda-nvdisasm
    python benchmarks/gpu_kernels.py [--architectures sm_80 sm_90a sm_100]

No GPU is needed. Instructions are those of the loops over sentences in the machine code, of a warp, each counted once,
or once for each of the parts in which a gradient is taken: nothing else in the kernels repeats. `issue limit` is what
they take where each of an H100's 528 schedulers issues one a cycle and nothing waits, for the 25,088 sentences of 128
images: no kernel can be faster, and a real one is slower.
"""

import argparse
import collections
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

from tnt_jax.models.functions import NORM_EPSILON
from tnt_jax.models.kernels.gpu import call, nvrtc
from tnt_jax.models.kernels.gpu.sizes import KERNELS, LayerSizes, Rows

SIZES = {
    "TNT-Ti": LayerSizes(16, 12, 2, 48, NORM_EPSILON),
    "TNT-S": LayerSizes(16, 24, 4, 96, NORM_EPSILON),
    "TNT-B": LayerSizes(16, 40, 4, 160, NORM_EPSILON),
}
ROWS = {model: Rows(width, width, NORM_EPSILON) for model, width in (("TNT-Ti", 192), ("TNT-S", 384), ("TNT-B", 640))}
SENTENCES, SCHEDULERS, CLOCK = 128 * 196, 528, 1.755e9
COUNTED = ("HMMA", "MUFU", "MOVM", "SHFL", "LDS", "LDL", "STL")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--architectures", nargs="+", default=("sm_80", "sm_90a", "sm_100"))
    arguments.add_argument("--models", nargs="+", choices=SIZES, default=tuple(SIZES))
    given = arguments.parse_args()
    columns = ("model", "kernel", "card", "registers", "spilled bytes", "instructions", "of them")
    print(f"| {' | '.join(columns)} | issue limit µs a layer |")
    print("|---|---|---|---|---|---|---|---|")
    for model in given.models:
        for kernel in (*KERNELS, "norm_gradient"):
            for architecture in given.architectures:
                print(_row(model, kernel, architecture), flush=True)


def _row(model: str, kernel: str, architecture: str) -> str:
    registers, spilled, code = account(kernel, (ROWS if kernel == "norm_gradient" else SIZES)[model], architecture)
    cells, loops = [model, kernel, architecture, str(registers), str(spilled)], instructions(code)
    if loops:
        # A gradient in parts runs its last loop for each of them.
        sizes = SIZES[model]
        parts = {"inner_mlp_gradient": sizes.mlp_parts, "inner_attention_gradient": sizes.attention_parts}
        loop = [opcode for each in loops[:-1] for opcode in each] + loops[-1] * parts.get(kernel, 1)
        kinds = collections.Counter(loop)
        of_them = ", ".join(f"{kinds[kind]} {kind}" for kind in COUNTED if kinds[kind])
        cells += [f"{len(loop):,}", of_them, f"{len(loop) * SENTENCES / SCHEDULERS / CLOCK * 1e6:.0f}"]
    else:
        cells += ["no nvdisasm", "", ""]
    return f"| {' | '.join(cells)} |"


def account(kernel: str, sizes: LayerSizes | Rows, architecture: str) -> tuple[int, int, bytes]:
    """Registers of a thread, bytes that it spills (stores), and the machine code."""
    options = (*call.options(kernel, sizes), "--ptxas-options=-v")
    code, log = nvrtc.compile_source(*call.source(kernel), architecture, options)
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    return registers, int(re.search(r"(\d+) bytes spill stores", log)[1]), code


def instructions(code: bytes) -> list[list[str]]:
    """The opcodes of each loop over sentences, in their order; empty without nvdisasm."""
    tool = shutil.which("nvdisasm")
    found = [path for folder in sys.path for path in pathlib.Path(folder).glob("nvidia/*/bin/nvdisasm")]
    if not tool and not found:
        return []
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        text = subprocess.run([tool or found[0], "-c", file.name], check=True, capture_output=True, text=True).stdout
    labels, opcodes, loops = {}, [], []
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(opcodes)
        if found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9]*)", line):
            opcodes.append(found[1])
            target = re.search(r"BRA.*(\.L_x_\d+)", line)
            if target and target[1] in labels:
                loops.append((labels[target[1]], len(opcodes)))
    # The innermost alone: an outer one holds them, and so does what a branch to code apart from its loop looks like.
    found = []
    for start, end in sorted(loops, key=lambda loop: loop[1] - loop[0]):
        if "MUFU" in opcodes[start:end] and all(end <= other[0] or other[1] <= start for other in found):
            found.append((start, end))
    return [opcodes[start:end] for start, end in sorted(found)]


if __name__ == "__main__":
    main()
