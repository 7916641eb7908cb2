"""What a command does to its own process before JAX starts."""

import compileall
import ctypes
import os
import platform
import shutil
import subprocess
import sys

from commands import ROOT
from PIL import Image
from small_models import small_model

import tnt_jax
from tnt_jax.commands import process

STEPS = """
import resource, jax, jax.numpy as jnp
from tnt_jax.commands.process import keep_memory
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
    monkeypatch.setattr(process, "_on_cpu_alone", lambda: True)
    loaded = []
    monkeypatch.setattr(ctypes, "CDLL", loaded.append)
    process.keep_memory()
    assert not loaded


def test_a_tpus_library_without_a_tpu_is_no_accelerator(monkeypatch, tmp_path):
    """It is what `--plan` needs on a laptop."""
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(process.importlib.util, "find_spec", lambda name: object() if name == "libtpu" else None)
    monkeypatch.setattr(process.importlib.metadata, "entry_points", lambda group: ())
    assert process._on_cpu_alone()
    monkeypatch.setattr(process, "_chips", lambda: [tmp_path])
    assert not process._on_cpu_alone()


def test_a_machine_without_an_accelerator_hears_nothing_of_tpus(tmp_path):
    """Where libtpu is installed, as `--plan` asks for, JAX alone prints its warnings."""
    command = [sys.executable, "predict.py", "nowhere", "nothing.png"]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_what_is_compiled_is_kept_for_the_next_start(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    code = "import jax; from tnt_jax.commands.process import use_compilation_cache as use; use(); "
    code += "print(jax.config.jax_compilation_cache_dir, jax.config.jax_compilation_cache_max_size)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(tmp_path / "tnt_jax/compiled"), str(4 * 2**30)]


def test_a_process_killed_while_it_wrote_to_the_cache_does_not_spoil_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    (cache := tmp_path / "tnt_jax" / "compiled").mkdir(parents=True)
    (cache / "jit_half-0123-cache").write_bytes(b"killed before the time of last use was written")
    code = "import jax; from tnt_jax.commands.process import use_compilation_cache as use; use(); "
    code += "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0); jax.jit(lambda x: x + 1)(1)"
    command = [sys.executable, "-W", "error", "-c", code]
    environment = os.environ | {"JAX_RAISE_PERSISTENT_CACHE_ERRORS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert [path.name[:10] for path in cache.glob("*-cache")] == ["jit__lambd"]


# A command that looks for devices.
LOOKS = """
from tnt_jax.commands.cli import command
@command
def main():
    import jax
    jax.devices()
main()
"""


def test_an_accelerator_that_does_not_answer_is_one_message():
    environment = os.environ | {"JAX_PLATFORMS": "cuda", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", LOOKS], env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "error: JAX cannot use JAX_PLATFORMS=cuda here" in done.stderr
    assert "JAX_PLATFORMS=cpu computes on the processor" in done.stderr
    assert "Traceback" not in done.stderr


def test_memory_that_runs_out_says_what_needs_less():
    message = process.of_accelerator(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"))
    assert message.startswith(
        "RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nA smaller --batch-size needs less"
    )
    assert "--accumulation-steps" in message
    assert process.of_accelerator(ValueError("a bug")) is None


def test_who_reads_may_have_seen_enough(tmp_path):
    tnt_jax.save_model(small_model(), tmp_path / "m")
    for index in range(40):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{index}.png")
    images = " ".join(str(tmp_path / f"{index}.png") for index in range(40))
    command = f"{sys.executable} predict.py {tmp_path}/m {images} --format csv --batch-size 1 | head -1"
    done = subprocess.run(command, cwd=ROOT, shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("image,")
    assert "Traceback" not in done.stderr
    assert "Broken" not in done.stderr


def test_modules_without_their_sources_work(tmp_path):
    """As some images of containers have them: help has no texts then."""
    shutil.copytree(ROOT / "tnt_jax", tmp_path / "tnt_jax", ignore=shutil.ignore_patterns("__pycache__"))
    compileall.compile_dir(tmp_path / "tnt_jax", quiet=2, legacy=True)
    for path in (tmp_path / "tnt_jax").rglob("*.py"):
        path.unlink()
    code = "import tnt_jax, tnt_jax.config as c; assert tnt_jax.__file__.endswith('.pyc'); c.TrainConfig()"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
