"""A finished run that several files of tests look at."""

import dataclasses
import shutil

import pytest
from small_runs import tiny_run

from tnt_jax.training.loop import train


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    config = tiny_run(tmp_path_factory.mktemp("runs") / "finished")
    train(config)
    return config


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run without its last checkpoint, which an earlier kill has left unwritten."""
    shutil.copytree(finished.run_dir, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/checkpoints/33")
    return dataclasses.replace(finished, run_dir=str(tmp_path / "copy"))
