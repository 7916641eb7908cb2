"""A teacher: its loss against PyTorch's, its own size and classes, sharding, and a run that goes on exactly."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from small_runs import assert_ended_as, metrics_of, tiny_run

import tnt_jax
from tnt_jax.config import DistillConfig, InputError
from tnt_jax.data.mixing import normalise
from tnt_jax.data.opening import open_split
from tnt_jax.models.variants import complete
from tnt_jax.storage.description import description_of
from tnt_jax.training.distillation import distillation_loss, open_teacher
from tnt_jax.training.mesh import make_mesh
from tnt_jax.training.run import Run


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_loss_is_pytorchs(temperature):
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 6, 5)).astype(np.float32)
    ours = distillation_loss(DistillConfig(temperature=temperature), jnp.array(student), jnp.array(teacher))
    logs = [torch.log_softmax(torch.tensor(each) / temperature, -1) for each in (student, teacher)]
    theirs = torch.nn.functional.kl_div(*logs, reduction="batchmean", log_target=True) * temperature**2
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
    ours = distillation_loss(DistillConfig(kind="hard"), jnp.array(student), jnp.array(teacher))
    theirs = torch.nn.functional.cross_entropy(torch.tensor(student), torch.tensor(teacher).argmax(-1))
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


def without_drop_path(config):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, drop_path_rate=0.0))


@pytest.fixture(scope="module")
def teacher(finished, tmp_path_factory):
    """The averaged weights of a run, as a model folder."""
    path = tmp_path_factory.mktemp("teacher") / "model"
    tnt_jax.save_model(tnt_jax.load_model(finished.run_dir), path)
    return str(path)


def test_a_student_that_equals_its_teacher_has_no_loss(teacher, tmp_path):
    """So the images, their normalisation and the order of the classes are the same for both."""
    config = without_drop_path(tiny_run(tmp_path / "run", init_from=teacher, epochs=1, log_every_steps=1))
    tnt_jax.train(dataclasses.replace(config, distill=DistillConfig(teacher, alpha=1.0)))
    first, second = [line for line in metrics_of(config.run_dir) if line["kind"] == "train"][:2]
    assert first["loss"] == first["distillation_loss"] == pytest.approx(0, abs=1e-6)
    assert second["distillation_loss"] < 1e-3


def test_a_teacher_sees_its_own_size_normalisation_and_classes(finished, tmp_path):
    model = tnt_jax.load_model(finished.run_dir)
    described = model.description = dataclasses.replace(description_of(model), class_names=tuple("abcdefghij"))
    tnt_jax.save_model(model, tmp_path / "model")
    config = complete(dataclasses.replace(finished, distill=DistillConfig(str(tmp_path / "model"))), 10)
    taught = open_teacher(config, tuple("jihgfedcba"), make_mesh())
    images = open_split(config.data, "test").images[:4].repeat(4, axis=1).repeat(4, axis=2)  # 32 pixels: it sees 16
    fed = normalise(jnp.array(images), config.data)
    found = taught.logits(taught.params, fed, config.data)
    small = jax.image.resize(jnp.array(images, jnp.float32) / 255, (4, 16, 16, 1), "cubic", antialias=True)
    expected = model((small - jnp.array(described.preprocessing.mean)) / jnp.array(described.preprocessing.std))
    np.testing.assert_allclose(found, expected[:, ::-1], atol=1e-4)


def test_a_distilled_run_goes_on_exactly_in_other_parts_and_shards(teacher, tmp_path):
    config = tiny_run(tmp_path / "run", distill=DistillConfig(teacher, kind="hard"))
    tnt_jax.train(config)
    again = dataclasses.replace(config, run_dir=str(tmp_path / "again"))
    tnt_jax.train(again, on_step=lambda step, metrics: step == 22)
    tnt_jax.train(again)
    assert_ended_as(again, config)
    sharded = dataclasses.replace(config, run_dir=str(tmp_path / "sharded"), fsdp=2, accumulation_steps=2, epochs=1)
    tnt_jax.train(sharded)
    losses = [
        [line["loss"] for line in metrics_of(each.run_dir) if line["kind"] == "train" and line["step"] <= 8]
        for each in (sharded, config)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_another_teacher_under_the_same_name_is_another_run(teacher, finished, tmp_path):
    config = tiny_run(tmp_path / "run", distill=DistillConfig(str(tmp_path / "teacher")), epochs=1)
    tnt_jax.save_model(tnt_jax.load_model(teacher), tmp_path / "teacher")
    tnt_jax.train(config)
    tnt_jax.save_model(tnt_jax.load_model(finished.run_dir, weights="raw"), tmp_path / "teacher", overwrite=True)
    with pytest.raises(InputError, match="parameters of the teacher"):
        tnt_jax.train(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 7}, "has other classes"),
        ({"in_channels": 3}, "takes images of 3 channels, and model.in_channels is 1"),
    ],
)
def test_a_teacher_that_does_not_fit_is_named(changes, message, tmp_path):
    sizes = {"image_size": 16, "in_channels": 1, "patch_size": 8, "word_stride": 4, "depth": 1, "num_classes": 10}
    small = {"inner_dim": 4, "inner_heads": 2, "outer_dim": 12, "outer_heads": 2}
    tnt_jax.save_model(tnt_jax.create_model("tnt_ti_patch16_224", **sizes | small | changes), tmp_path / "model")
    config = tiny_run(tmp_path / "run", distill=DistillConfig(str(tmp_path / "model")))
    with pytest.raises(InputError) as error:
        Run(config)
    assert str(error.value).startswith(f"the teacher {tmp_path / 'model'} ")
    assert message in str(error.value)
