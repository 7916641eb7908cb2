import pytest
from small_runs import tiny_run

from tnt_jax.training.loop import train


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """The folder of a finished run on digits, of one epoch; its parameters lie on one device, wherever it trained."""
    config = tiny_run(tmp_path_factory.mktemp("runs") / "tiny", epochs=1)
    train(config)
    return config.run_dir
