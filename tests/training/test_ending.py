"""A run that ends before its last epoch: because it has got worse, or because a caller says so."""

import dataclasses
import os
import signal
import time

import pytest
from small_runs import assert_ended_as, metrics_of, tiny_run

import tnt_jax
from tnt_jax.config import EarlyStopConfig
from tnt_jax.storage.reading import steps_of
from tnt_jax.training.run import Run
from tnt_jax.training.signals import StoppedError

ACCURACY = (0.5, 0.6, 0.55, 0.6, 0.4, 0.3, 0.9, 0.9)  # after each epoch


@pytest.fixture
def scored(monkeypatch):
    """Evaluations say of each epoch what stands above."""
    evaluate = Run.evaluate

    def say(self, state, stop):
        found = evaluate(self, state, stop)
        return found and found | {"ema_top1": ACCURACY[int(state.step) // self.steps_per_epoch - 1]}

    monkeypatch.setattr(Run, "evaluate", say)


@pytest.mark.slow
def test_a_run_ends_after_so_many_evaluations_that_were_worse_and_counts_on_when_it_is_started_again(
    scored, tmp_path, capsys
):
    config = tiny_run(tmp_path / "run", epochs=8, batch_size=512, early_stop=EarlyStopConfig(2))
    scores = tnt_jax.train(config)
    assert "Ended after epoch 6 of 8: 2 evaluations in a row were worse than the best." in capsys.readouterr().out
    assert scores["ema_top1"] == 0.3
    assert steps_of(config.run_dir) == [8, 10, 12]  # the best, and the latest two
    assert tnt_jax.train(config) == scores
    assert "is finished" in capsys.readouterr().out

    again = dataclasses.replace(config, run_dir=str(tmp_path / "again"))

    def fifth(epoch, scores):
        if epoch == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tnt_jax.train(again, on_epoch=fifth)
    assert tnt_jax.train(again) == scores
    assert steps_of(again.run_dir) == [8, 10, 12]
    longer = dataclasses.replace(config, early_stop=EarlyStopConfig(3))
    assert tnt_jax.train(longer)["ema_top1"] == 0.9


@pytest.mark.slow
def test_a_caller_sees_every_step_and_ends_the_run_which_then_goes_on(finished, tmp_path):
    config = dataclasses.replace(finished, run_dir=str(tmp_path / "run"))
    steps, epochs = [], []

    def on_step(step, metrics):
        steps.append((step, float(metrics["loss"])))
        return step == 15

    scores = tnt_jax.train(config, on_step=on_step, on_epoch=lambda *of: epochs.append(of))
    assert [step for step, _ in steps] == list(range(1, 16))
    assert [epoch for epoch, _ in epochs] == [1, pytest.approx(15 / 11)]
    assert epochs[-1][1] == scores
    lines = {line["step"]: line for line in metrics_of(config.run_dir) if line["kind"] == "train"}
    assert dict(steps)[12] == lines[12]["loss"]
    assert max(steps_of(config.run_dir)) == 15
    tnt_jax.train(config, on_epoch=lambda epoch, scores: epoch == 2)
    assert max(steps_of(config.run_dir)) == 22
    tnt_jax.train(config)
    extra = [line for line in metrics_of(config.run_dir) if line["step"] == 15]
    assert {line["kind"] for line in extra} >= {"test"}


@pytest.mark.slow
def test_early_stop_binds_no_run(finished, copy):
    """It decides when a run ends, and not what a step computes."""
    tnt_jax.train(dataclasses.replace(copy, early_stop=EarlyStopConfig(100)))
    assert_ended_as(copy, finished)


@pytest.mark.slow
def test_an_evaluation_that_was_lost_is_told_to_the_caller_too(scored, tmp_path):
    config, epochs = tiny_run(tmp_path / "run", epochs=3, batch_size=512), []

    def stop(step, metrics):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)

    def second(epoch, scores):
        epochs.append(epoch)
        return epoch == 1

    with pytest.raises(StoppedError, match="stopped after step 2 of 6"):
        tnt_jax.train(config, on_step=stop, on_epoch=second)
    assert not epochs
    assert tnt_jax.train(config, on_epoch=second)["ema_top1"] == ACCURACY[0]
    assert (epochs, steps_of(config.run_dir)) == ([1], [2])


def test_a_stop_at_the_very_last_step_is_said_and_the_next_start_evaluates_it(finished, tmp_path):
    config = dataclasses.replace(finished, run_dir=str(tmp_path / "run"))

    def stop_at_the_last(step, metrics):
        if step == 33:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)  # until the thread that listens has it

    with pytest.raises(StoppedError, match="stopped after step 33 of 33, which is saved"):
        tnt_jax.train(config, on_step=stop_at_the_last)
    tnt_jax.train(config)
    assert_ended_as(config, finished)
