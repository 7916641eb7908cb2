"""What converting a checkpoint takes of memory."""

import subprocess
import sys

import commands
import numpy as np
import pytest
import safetensors.numpy
import torch
from state_dicts import as_torch

from tnt_jax.models.variants import model_config
from tnt_jax.storage.folder import parameter_shapes
from tnt_jax.storage.torch.layouts import layout_shapes

# The peak of this process alone: what `resource` says includes the process that it was forked from.
PEAK = """
import sys
from tnt_jax.commands.convert import main
main()
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.nightly
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_converting_tnt_b_peaks_below_three_times_its_checkpoint(suffix, tmp_path):
    """All of the process counts: the interpreter and JAX as well."""
    shapes = parameter_shapes(model_config(name="tnt_b_patch16_224"))
    tensors = {
        name: np.ones(shape, np.float32)
        for name, shape in layout_shapes({path: of.shape for path, of in shapes.items()}, "timm").items()
    }
    checkpoint = tmp_path / f"tnt_b{suffix}"
    if suffix == ".pth":
        torch.save(as_torch(tensors), checkpoint)
    else:
        safetensors.numpy.save_file(tensors, checkpoint)
    command = [sys.executable, "-c", PEAK, checkpoint, tmp_path / "model"]
    done = subprocess.run(command, cwd=commands.ROOT, check=True, capture_output=True, text=True)
    peak = int(done.stdout.split()[-1]) * 1024
    assert peak < 3 * checkpoint.stat().st_size
