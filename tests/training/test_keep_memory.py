"""A step finds the memory of the step before it."""

import ctypes
import os
import platform
import subprocess
import sys
import types

from tnt_jax.training import memory

STEPS = """
import resource, jax, jax.numpy as jnp
from tnt_jax.training.memory import keep_memory
if {keep}: keep_memory()
x = jnp.ones((2048, 64))
step = jax.jit(lambda x: jnp.linalg.norm(jnp.tile(x, (128, 1)) @ jnp.ones((64, 64))))
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    before = faults()
    step(x).block_until_ready()
print(faults() - before)
"""


def test_a_step_takes_no_new_pages():
    def faults(keep: bool) -> int:
        """Pages that the system hands out for the third step."""
        command = [sys.executable, "-c", STEPS.format(keep=keep)]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        return int(subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout)

    assert faults(keep=True) < faults(keep=False) / 20


def test_other_c_libraries_are_left_as_they_are(monkeypatch):
    """Windows has none under the name that is asked for, macOS no mallopt."""
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(memory, "_on_cpu_alone", lambda: True)
    loaded = []
    monkeypatch.setattr(ctypes, "CDLL", loaded.append)
    memory.keep_memory()
    assert not loaded


def test_a_tpus_library_without_a_tpu_is_no_accelerator(monkeypatch, tmp_path):
    """It is what `--plan` needs on a laptop."""
    monkeypatch.setattr(memory.jax, "config", types.SimpleNamespace(jax_platforms=None))
    monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: object() if name == "libtpu" else None)
    monkeypatch.setattr(memory.importlib.metadata, "entry_points", lambda group: ())
    assert memory._on_cpu_alone()
    monkeypatch.setattr(memory, "_chips", lambda: [tmp_path])
    assert not memory._on_cpu_alone()
