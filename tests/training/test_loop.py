"""A run as its user sees it: from nothing to a model, stopped and gone on with, and what stops it."""

import dataclasses
import importlib.machinery
import pathlib
import shutil
import signal
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from commands import ROOT, run
from PIL import Image
from small_runs import config_file, metrics_of, parameters, tiny_run

import tnt_jax
from tnt_jax.chips import CHIPS, GIB, Chip
from tnt_jax.config import DataConfig, OptimizerConfig
from tnt_jax.data.sources import Split
from tnt_jax.evaluation.evaluate import evaluate_model
from tnt_jax.storage.checkpoint import NonFiniteError
from tnt_jax.storage.reading import scores_of
from tnt_jax.training.loop import train
from tnt_jax.training.run import Run
from tnt_jax.visualize.runs import curves


@pytest.fixture
def finished(finished):
    """The finished run of the session and its scores."""
    return finished, scores_of(finished.run_dir)[33]


@pytest.mark.slow
def test_scores_are_those_of_the_weights_that_are_kept(finished):
    config, scores = finished
    assert scores["count"] == 360
    assert scores["ema_top1"] > 0.15  # chance is 0.1
    evaluated = {each.weights: each.predictions.metrics() for each in evaluate_model(config.run_dir, batch_size=7)}
    best = max(
        (line for line in metrics_of(config.run_dir) if line["kind"] == "test"),
        key=lambda line: (line["ema_top1"], line["step"]),
    )
    assert evaluated["averaged"]["images"] == evaluated["raw"]["images"] == 360
    for name in ("top1", "top5"):
        assert evaluated["averaged"][name] == pytest.approx(best[f"ema_{name}"])
        assert evaluated["raw"][name] == pytest.approx(best[f"raw_{name}"])
    assert evaluated["raw"]["loss"] != pytest.approx(evaluated["averaged"]["loss"])


def test_metrics_hold_every_log_step_and_every_evaluation(finished):
    lines = metrics_of(finished[0].run_dir)
    assert [line["step"] for line in lines if line["kind"] == "train"] == [4, 8, 12, 16, 20, 24, 28, 32, 33]
    assert [line["epoch"] for line in lines if line["kind"] == "test"] == [1, 2, 3]
    assert {"loss", "accuracy", "grad_norm", "learning_rate", "images_per_second"} <= lines[0].keys()
    assert any((pathlib.Path(finished[0].run_dir) / "tensorboard").iterdir())


def test_finished_run_says_so_and_changes_nothing(finished, capsys):
    config, scores = finished
    before = (pathlib.Path(config.run_dir) / "metrics.jsonl").read_bytes()
    assert train(config) == scores
    assert "is finished" in capsys.readouterr().out
    assert (pathlib.Path(config.run_dir) / "metrics.jsonl").read_bytes() == before


# Kills itself in the middle of the second save.
KILLED = """
import os, runpy, signal, sys
from tnt_jax.training import loop
save = loop.Checkpoints.save
def save_or_die(self, step, *rest):
    save(self, step, *rest)
    if step == 11:
        self.wait()
    else:
        os.kill(os.getpid(), signal.SIGKILL)
loop.Checkpoints.save = save_or_die
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.slow
def test_run_that_is_killed_goes_on_and_ends_as_if_nothing_had_happened(finished, tmp_path):
    config, _ = finished
    arguments = ["--run-dir", str(tmp_path / "run"), "--config", config_file(tmp_path)]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with (tmp_path / "run" / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"kind": "train", "st')  # what a kill in the middle of a line leaves
    again = subprocess.run([sys.executable, "train.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "Going on with" in again.stdout
    for weights in ("ema", "raw"):
        pairs = zip(
            parameters(tmp_path / "run", weights=weights, step=33),
            parameters(config.run_dir, weights=weights, step=33),
            strict=True,
        )
        assert all((a == b).all() for a, b in pairs)

    def history(run_dir):
        return [{name: line[name] for name in line if name != "images_per_second"} for line in metrics_of(run_dir)]

    assert history(tmp_path / "run") == history(config.run_dir)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "exit_code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.nightly), (signal.SIGTERM, 75)]
)
def test_ctrl_c_and_sigterm_save_and_say_how_to_go_on(stop, exit_code, tmp_path):
    arguments = ["--run-dir", str(tmp_path / "run"), "--config", config_file(tmp_path), "--epochs", "2000"]
    command = [sys.executable, "-u", "train.py", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("epoch 2/"):
                process.send_signal(stop)
                break
        _, err = process.communicate(timeout=120)
    assert process.returncode == exit_code, err
    assert "Traceback" not in err
    assert "stopped after step" in err
    assert "the same command" in err
    assert parameters(tmp_path / "run", weights="raw")


@pytest.mark.parametrize("damage", [pytest.param("flipped bytes", marks=pytest.mark.slow), "truncated"])
def test_damaged_checkpoint_is_put_aside_and_the_run_still_ends_as_it_should(damage, finished, tmp_path, capsys):
    config, scores = finished
    shutil.copytree(config.run_dir, tmp_path / "run")
    # In which of these files an array lies is chance, so they are all damaged, and in many places.
    for path in (tmp_path / "run/checkpoints/33").rglob("d/*"):
        content = path.read_bytes()
        if len(content) > 1000:
            flipped = bytes(byte ^ (at % 1000 == 500) for at, byte in enumerate(content))
            path.write_bytes(content[:100] if damage == "truncated" else flipped)
    with pytest.raises(tnt_jax.InputError, match=r"step 33.*is damaged"):
        tnt_jax.load_model(tmp_path / "run", weights="raw", step=33)
    assert train(dataclasses.replace(config, run_dir=str(tmp_path / "run"))) == scores
    out = capsys.readouterr().out
    assert "the checkpoint of step 33" in out
    assert "Going back to step 22" in out
    assert (tmp_path / "run/checkpoints/damaged-33").is_dir()
    pairs = zip(
        parameters(tmp_path / "run", weights="raw", step=33),
        parameters(config.run_dir, weights="raw", step=33),
        strict=True,
    )
    assert all((a == b).all() for a, b in pairs)


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    from tnt_jax.training import run as run_module

    take_step = run_module.Run.train_step

    def poisoned(self, state, batch):
        if int(state.step) == 15:
            state = dataclasses.replace(state, params=jax.tree.map(lambda leaf: leaf * np.nan, state.params))
        return take_step(self, state, batch)

    monkeypatch.setattr(run_module.Run, "train_step", poisoned)
    with pytest.raises(NonFiniteError, match=r"the loss of step 16 is nan.*step 11"):
        train(tiny_run(tmp_path / "run"))
    assert all(np.isfinite(leaf).all() for leaf in parameters(tmp_path / "run", weights="raw", step=11))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.name", "tnt_x_patch16_224"], "no model 'tnt_x_patch16_224'; the nearest names are"),
        (["--model.image-size", "30"], "(30, 30) is not a multiple of the patch size 8"),
        (["--model.num-classes", "11"], "model.num_classes is 11, and digits has 10 classes"),
        (["--batch-size", "2000"], "batch_size 2000"),
        (["--epochs", "0"], "epochs is 0"),
        (["--data.source", "digit"], "data source 'digit'"),
        (["--data.source", "idx:nowhere"], "nowhere holds neither train-images-idx3-ubyte"),
        (["--config", "configs/nothing.py"], "there is no configuration configs/nothing.py"),
        (["--optimizer.learning-rte", "1"], "--optimizer.learning-r"),
        (["--epochs", "many"], "many"),
        (["--optimizer.learning-rate", "5e-6"], "optimizer.learning_rate is 5e-06, and must be at least"),
    ],
)
def test_wrong_arguments_are_one_message_and_nothing_is_written(arguments, message, tmp_path):
    code, out, err = run("train.py", "--run-dir", tmp_path / "run", *arguments)
    assert code == 2
    assert message in " ".join((out + err).replace("│", " ").split())
    assert "Traceback" not in out + err
    assert not (tmp_path / "run").exists()


def test_folder_of_another_run_is_refused_and_left_alone(finished, tmp_path):
    config, _ = finished
    with pytest.raises(tnt_jax.InputError, match=r"another configuration: seed 0 \(now 1\)"):
        train(dataclasses.replace(config, seed=1))
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(tnt_jax.InputError, match="is not the folder of a run"):
        train(tiny_run(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_what_no_step_depends_on_may_change_between_starts(finished, tmp_path, capsys):
    config, _ = finished
    shutil.copytree(config.run_dir, tmp_path / "run")
    train(dataclasses.replace(config, run_dir=str(tmp_path / "run"), eval_every_epochs=2))
    assert "eval_every_epochs was 1 and is now 2" in capsys.readouterr().out


def write_targets(folder, columns, values) -> str:
    """A table of 16 training images and as many validation images as there are values."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = [(*rng.normal(size=len(columns)), "train") for _ in range(16)] + [(*value, "val") for value in values]
    for number, _ in enumerate(rows):
        Image.fromarray(rng.integers(0, 256, (16, 16), np.uint8)).save(folder / f"{number}.png")
    lines = [",".join(map(str, (f"{number}.png", *row))) for number, row in enumerate(rows)]
    (folder / "table.csv").write_text("\n".join([f"image,{','.join(columns)},split", *lines]) + "\n")
    return f"csv:{folder}/table.csv"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("columns", "values", "r2"), [("x", [[0.5]], None), ("xy", [[0.5, 1], [0.2, 1], [0.3, 1]], float)]
)
def test_a_metric_that_is_undefined_condemns_no_checkpoint(columns, values, r2, tmp_path, capsys):
    """R2 of one image, and of a target that is constant in the validation images."""
    source = write_targets(tmp_path / "data", columns, values)
    data = DataConfig.plain(source, task="regression")
    config = tiny_run(tmp_path / "run", data=data, batch_size=8, epochs=2)
    scores = train(config)
    assert scores["ema_rmse"] > 0
    assert (scores["ema_r2"] is None) == (r2 is None)
    assert [line["ema_r2"] for line in metrics_of(config.run_dir) if line["kind"] == "test"][-1] == scores["ema_r2"]
    assert not any("damaged" in path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert {line["split"] for line in metrics_of(config.run_dir) if line["kind"] == "test"} == {"val"}
    assert ("val R2 - with averaged weights" in capsys.readouterr().out) == (r2 is None)
    assert train(config) == scores
    curves(config.run_dir)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": OptimizerConfig(learning_rate=5e-3, warmup_epochs=5)}, "the warm-up of 5 epochs is not over"),
        ({"data": DataConfig.plain("one")}, "all images are of one class, 'a': there is nothing to learn"),
    ],
)
def test_a_run_that_cannot_be_what_was_meant_says_so(changes, words, tmp_path, monkeypatch):
    if "data" in changes:
        from tnt_jax.training import run as run_module

        one = Split(np.zeros((8, 16, 16, 1), np.uint8), np.zeros(8, np.int32), ("a",))
        monkeypatch.setattr(run_module, "open_split", lambda data, split: one)
    assert words in Run(tiny_run(tmp_path / "run", batch_size=8, **changes)).describe(0)


def test_a_run_lasts_as_long_as_its_epochs_and_its_cooldown(tmp_path):
    optimizer = OptimizerConfig(cooldown_epochs=2)
    assert Run(tiny_run(tmp_path / "run", optimizer=optimizer)).total_steps == (3 + 2) * 11


def test_a_run_is_evaluated_every_so_many_epochs_and_at_its_end(tmp_path):
    run = Run(tiny_run(tmp_path, eval_every_epochs=2))
    assert [step for step in range(1, 34) if run.evaluates_after(step)] == [22, 33]


def test_run_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(tnt_jax.InputError, match="cannot write into the run's folder"):
        train(tiny_run(tmp_path / "file" / "run"))


# A disk on which no file may be larger than this: the logs fit, a checkpoint does not, into however many files Orbax
# puts it. Python would cut a compiled module short without a word.
FULL = """
import resource, runpy, sys
sys.dont_write_bytecode = True
resource.setrlimit(resource.RLIMIT_FSIZE, (11_000, 11_000))
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.slow
def test_checkpoint_that_cannot_be_written_stops_the_run_and_harms_none_before_it(finished, tmp_path):
    config, _ = finished
    run_dir = tmp_path / "run"
    shutil.copytree(config.run_dir, run_dir)
    shutil.rmtree(run_dir / "checkpoints/33")
    arguments = ["--config", config_file(tmp_path), "--run-dir", str(run_dir)]
    done = subprocess.run([sys.executable, "-c", FULL, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "error: a checkpoint cannot be written into" in done.stderr
    assert "the last good checkpoint is step 22" in done.stderr
    assert parameters(run_dir, weights="raw", step=22)
    assert train(dataclasses.replace(config, run_dir=str(run_dir)))["count"] == 360


def stand_in_for_wandb() -> types.ModuleType:
    """What a run calls of Weights & Biases; it keeps the calls."""
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.calls = []

    def init(**arguments):
        module.calls.append(arguments)
        return types.SimpleNamespace(
            define_metric=lambda name, step_metric: module.calls.append((name, step_metric)),
            log=module.calls.append,
            finish=lambda: module.calls.append("finish"),
        )

    module.init = init
    return module


@pytest.mark.slow
def test_what_is_watched_when_asked_for(tmp_path, monkeypatch, capsys):
    wandb = stand_in_for_wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(CHIPS, "cpu", Chip("abacus", GIB, 1e12, 1e9))
    config = tiny_run(tmp_path / "run", epochs=2, wandb=True, profile=True)
    train(config)
    begun, metric, *logged, finished = wandb.calls
    assert begun["project"] == "tnt_jax"
    assert begun["id"] == (tmp_path / "run/wandb_id.txt").read_text()
    assert finished == "finish"
    # Its own steps must rise: an evaluation that is done again would be dropped.
    assert metric == ("*", "step")
    assert [values["step"] for values in logged if "test/ema_top1" in values] == [11, 22]
    assert any((tmp_path / "run/profile").rglob("*.xplane.pb"))
    out = capsys.readouterr().out
    assert "% of the chips' peak" in out
    assert "of it compiling" in out
    # How it is watched is no part of what the run is.
    assert train(dataclasses.replace(config, wandb=False, profile=False))["count"] == 360


@pytest.mark.slow
def test_weights_and_biases_that_does_not_answer_ends_no_run(tmp_path, monkeypatch, capsys):
    wandb = stand_in_for_wandb()

    def no_key(**arguments):
        raise RuntimeError("No API key configured")

    wandb.init = no_key
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert train(tiny_run(tmp_path / "run", epochs=1, wandb=True))["count"] == 360
    assert "note: Weights & Biases: No API key configured. Nothing more is logged there" in capsys.readouterr().out


def test_weights_and_biases_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, _, err = run("train.py", "--run-dir", tmp_path / "run", "--wandb")
    assert code == 2
    assert "pip install wandb" in err
    assert not (tmp_path / "run").exists()
