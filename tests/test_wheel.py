"""The wheel, in an environment without this checkout: names, commands and configurations are in it."""

import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile

import pytest
from commands import ROOT

PARTS = ("tnt_jax", "configs", "pyproject.toml", "README.md", "LICENSE", "requirements.txt")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_listed():
    folders = {"tnt_jax"} | {
        str(path.parent.relative_to(ROOT)).replace("/", ".") for path in ROOT.glob("tnt_jax/**/__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == folders | {"tnt_jax.configs"}


def test_every_script_has_a_command_in_the_wheel():
    scripts = {path.stem for path in ROOT.glob("*.py")}
    assert {f"tnt-{script.removesuffix('_torch_weights')}" for script in scripts} | {
        *("tnt-prepare", "tnt-cache", "tnt-calibrate", "tnt-check", "tnt-runs", "tnt-embed"),
    } == set(PROJECT["project"]["scripts"])


@pytest.mark.slow
def test_a_wheel_trains_digits_for_an_epoch_from_an_empty_folder(tmp_path):
    source = tmp_path / "source"  # setuptools writes beside what it reads
    source.mkdir()
    for name in PARTS:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = ("xla_ffi.h", "gpu/lanes.h", "gpu/inner_forward.cu", "gpu/launch.c")
        kernels = {f"tnt_jax/models/kernels/{name}" for name in names}
        configs = {f"tnt_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
        assert {"tnt_jax/data/resample.c"} | configs | kernels <= set(archive.namelist())
    environment, empty = tmp_path / "environment", tmp_path / "empty"
    venv.create(environment, with_pip=True)
    empty.mkdir()
    # What the wheel needs is what is installed here, so it is lent instead of downloaded.
    lent = next((environment / "lib").glob("python*")) / "site-packages" / "lent.pth"
    lent.write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    install = [
        environment / "bin/python",
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--force-reinstall",
        wheel,
    ]
    subprocess.run(install, check=True, capture_output=True)

    def run(*command):
        path = {"PATH": f"{environment / 'bin'}:{os.environ['PATH']}", "JAX_PLATFORMS": "cpu"}
        return subprocess.run(command, cwd=empty, env=os.environ | path, capture_output=True, text=True, check=False)

    where = run("python", "-c", "import tnt_jax; print(tnt_jax.__version__, tnt_jax.__file__)")
    assert str(environment) in where.stdout, where.stderr
    done = run("tnt-train", "--epochs", "1", "--run-dir", "run")
    assert done.returncode == 0, done.stderr
    assert "tnt-eval run" in done.stdout
    assert "top-1" in run("tnt-eval", "run").stdout
    assert run("tnt-train", "--config", "imagenet_tnt_s", "--help").returncode == 0
