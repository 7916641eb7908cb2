"""`train.py --sweep` trains every combination, goes on where it stopped, and lists them."""

import subprocess
import sys

import pytest
from commands import ROOT, run
from small_runs import config_file

from tnt_jax.storage.reading import steps_of


@pytest.mark.slow
def test_every_combination_has_its_run_and_a_second_start_trains_what_is_missing(tmp_path):
    def sweep(*given):
        command = [sys.executable, "train.py", "--config", config_file(tmp_path), "--run-dir", tmp_path / "runs"]
        done = subprocess.run([*command, "--epochs", "1", *given], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout, [steps_of(tmp_path / "runs" / name) for name in names]

    names = [f"optimizer.learning_rate={rate},seed=0" for rate in ("1e-3", "2e-3")]
    out, steps = sweep("--log-every-steps", "5", "--sweep", "optimizer.learning_rate=1e-3", "seed=0")
    assert (out.count("finished"), steps) == (1, [[11], []])
    out, steps = sweep("--best-metric", "top5", "--sweep", "optimizer.learning_rate=1e-3,2e-3", "seed=0")
    assert f"Run 2 of 2: {names[1]}" in out
    assert (out.count("is finished. Use another --run-dir"), steps) == (1, [[11], [11]])


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("seed", "--sweep was given 'seed', which should be FIELD=VALUE,VALUE"),
        ("batch_size=64,0", "batch_size is 0, and must be at least 1"),
    ],
)
def test_nothing_is_started_where_one_of_them_means_nothing(field, message, tmp_path):
    code, out, err = run("train.py", "--run-dir", tmp_path / "runs", "--sweep", field)
    assert (code, out) == (2, "")
    assert message in err
    assert not (tmp_path / "runs").exists()
