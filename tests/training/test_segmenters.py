"""The class of every pixel, from masks to a trained model, and every command that follows it."""

import csv
import dataclasses
import json

import commands
import dense_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_runs import (
    FEW,
    SMALL_PYRAMID,
    assert_goes_on_exactly,
    assert_same_step,
    learned,
    outputs_when_saved_again,
    run,
    write_few,
)
from flax import nnx
from PIL import Image
from sklearn.metrics import jaccard_score
from small_models import small_model
from small_runs import history

import tnt_jax
from benchmarks.scenes import NAMES, scenes, write
from tnt_jax.config import InputError, LossConfig, ModelChanges, check
from tnt_jax.inference import predict_images
from tnt_jax.models.variants import build_model, complete
from tnt_jax.storage.description import read_description
from tnt_jax.tasks.segmentation import IGNORED
from tnt_jax.training.loop import train
from tnt_jax.training.run import Run

SMALL = dataclasses.replace(dense_runs.SMALL, outer_dim=12, outer_heads=3, head="mlp")


def run_of(folder, source, model=SMALL, **changes):
    return dense_runs.run_of(folder, f"masks:{source}", "segmentation", model, {}, **changes)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return write_few(tmp_path_factory)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("mlp", marks=pytest.mark.slow),
        *(pytest.param(head, marks=pytest.mark.nightly) for head in ("linear", "mlp_words", "pyramid")),
    ],
)
def finished(request, few, tmp_path_factory):
    """A run of each head; `mlp` of a TNT and of a PyramidTNT."""
    if request.param == "pyramid":
        model = dataclasses.replace(SMALL_PYRAMID, head="mlp")
    else:
        model = dataclasses.replace(SMALL, head=request.param)
    config = run_of(tmp_path_factory.mktemp(request.param) / "run", few, model)
    train(config)
    return config


def test_a_stopped_run_ends_as_one_that_was_not(finished, tmp_path):
    again = assert_goes_on_exactly(finished, tmp_path / "run")
    of_training = [[line for line in history(each.run_dir) if line["kind"] == "train"] for each in (again, finished)]
    assert of_training[0][-1] == of_training[1][-1]


def test_a_model_is_described_saved_and_loaded_with_its_head(finished, tmp_path):
    described = read_description(finished.run_dir)
    assert (described.config.head, described.outputs.task, described.class_names) == (
        finished.model.head,
        "segmentation",
        NAMES,
    )
    assert outputs_when_saved_again(finished.run_dir, tmp_path / "model").shape == (2, 64, 64, 11)


def step_of(config, devices):
    """Loss and parameters after a step on so many devices."""
    images, masks, _ = scenes("train", config.batch_size)
    masks = masks.astype(np.uint16)
    masks[0, :20], masks[1] = IGNORED, IGNORED
    return dense_runs.step_of(config, len(NAMES), images, masks, devices)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["mlp", pytest.param("linear", marks=pytest.mark.nightly)])
def test_a_step_is_the_same_on_several_devices(head, few, tmp_path):
    config = run_of(tmp_path, few, dataclasses.replace(SMALL, head=head))
    assert_same_step(step_of(config, 1), step_of(config, 4))


@pytest.mark.slow
def test_parts_of_a_batch_have_the_loss_of_the_whole(few, tmp_path):
    """Without batch norm, which sees a part at a time."""
    config = run_of(tmp_path, few, dataclasses.replace(SMALL, head="linear"))
    whole, parts = step_of(config, 1)[0], step_of(dataclasses.replace(config, accumulation_steps=4), 1)[0]
    assert whole == pytest.approx(parts, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("param_dtype", [pytest.param("float32", marks=pytest.mark.nightly), "bfloat16"])
def test_bfloat16_trains_and_its_logits_are_float32(param_dtype, few, tmp_path):
    model = dataclasses.replace(SMALL, dtype="bfloat16", param_dtype=param_dtype)
    loss, _ = step_of(run_of(tmp_path, few, model, loss=LossConfig("pixel_cross_entropy")), 1)
    assert np.isfinite(loss)
    built = build_model(complete(run_of(tmp_path, few, model), 11).model)
    assert nnx.eval_shape(lambda: built(jnp.zeros((1, 64, 64, 1)))).dtype == jnp.float32


@pytest.mark.slow
def test_weights_of_classes_are_numbers(few, tmp_path):
    weights = tuple(np.linspace(0, 1, 11).tolist())
    plain, weighed = (
        step_of(run_of(tmp_path, few, loss=LossConfig(class_weights=each)), 1)[0] for each in ("none", weights)
    )
    assert plain != pytest.approx(weighed, rel=1e-3)


def test_a_run_starts_from_a_classifier_and_from_another_segmenter(finished, few, tmp_path, caplog):
    """The blocks are those of the classifier, the head is fresh; the same classes keep their head."""
    if finished.model.name.startswith("ptnt"):  # the classifier below is a TNT
        return
    changes = dataclasses.asdict(SMALL) | {"head": "class", "num_classes": 3, "image_size": 32}
    classifier = small_model(**{name: value for name, value in changes.items() if value is not None})
    tnt_jax.save_model(classifier, tmp_path / "classifier")
    config = dataclasses.replace(finished, run_dir=str(tmp_path / "run"), init_from=str(tmp_path / "classifier"))
    begun = Run(config).initial_state().params
    np.testing.assert_array_equal(
        begun["blocks"][0]["outer"]["mlp"]["fc1"]["kernel"], classifier.blocks[0].outer.mlp.fc1.kernel[...]
    )
    assert begun["sentence_positions"].shape == (1, 17, 12)
    assert "its outputs are of task single_label, and segmentation is wanted: the head is fresh" in caplog.text
    again = Run(dataclasses.replace(config, init_from=finished.run_dir)).initial_state().params
    best = nnx.to_pure_dict(nnx.state(tnt_jax.load_model(finished.run_dir)))
    assert jax.tree.all(jax.tree.map(lambda ours, theirs: bool(np.array_equal(ours, theirs)), again, best))


def test_every_command(finished, few, tmp_path):
    folder, table = finished.run_dir, tmp_path / "table.csv"
    run("eval.py", folder, "--per-class", "--table", table, "--out", tmp_path / "a.jsonl")
    averaged, _ = csv.DictReader(table.open())
    assert float(averaged["miou_low"]) <= float(averaged["miou"]) <= float(averaged["miou_high"])
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * FEW["test"]
    image = few / "test/images/0003.png"
    out = run("predict.py", folder, image, "--format", "jsonl", "--out", tmp_path / "masks")
    shares = json.loads(out)["pred_shares"]
    mask = Image.open(tmp_path / "masks/0003.png")
    assert (mask.mode, mask.size) == ("P", (64, 64))
    counts = np.bincount(np.asarray(mask).ravel(), minlength=11) / 64**2
    assert shares == pytest.approx({NAMES[label]: counts[label] for label in np.flatnonzero(counts)})
    assert Image.open(tmp_path / "masks/0003_overlay.png").mode == "RGB"
    assert float(rows[3]["pixel_accuracy"]) == pytest.approx(
        (np.asarray(mask) == np.asarray(Image.open(few / "test/masks/0003.png"))).mean(), abs=1e-3
    )
    header, *lines = run("predict.py", folder, few / "test/images", "--format", "csv").splitlines()
    assert header == "image," + ",".join(f"class_{rank},share_{rank}" for rank in range(1, 6))
    assert {line.count(",") for line in lines} == {10}
    code, _, err = commands.run("predict.py", folder, image, "--out", tmp_path / "masks")
    assert (code, "which is there already; name a new folder" in err) == (2, True)


@pytest.mark.nightly
def test_pictures_and_files(finished, few, tmp_path):
    folder = finished.run_dir
    for what in ("confusion", "mistakes", "curves", "batch"):
        run("visualize.py", what, folder, "--out", tmp_path / "a.png")
        assert np.asarray(Image.open(tmp_path / "a.png")).std() > 5
    for kind in ("onnx", "stablehlo"):
        run("export.py", folder, "--format", kind, "--out", tmp_path / f"a.{kind}")
        about = json.loads((tmp_path / f"a.{kind}.json").read_text())
        assert about["output"]["shape"] == ["batch", 64, 64, 11]
        assert about["input"]["fit_whole_into"] == [64, 64]
    run("export.py", folder, "--format", "hub", "--out", tmp_path / "hub")
    images = jnp.zeros((1, 64, 64, 1))
    both = [nnx.jit(lambda model: model(images))(tnt_jax.load_model(each)) for each in (folder, tmp_path / "hub")]
    np.testing.assert_array_equal(*both)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("export.py", ["--format", "web"], "a page shows predictions of whole images, and the task of the model is"),
        ("visualize.py", ["why"], "what is explained is one prediction of an image"),
        ("eval.py", ["--probe", "knn"], "is segmentation, and --probe asks for classes"),
        ("eval.py", ["--crop", "0.8"], "crop is 0.8, and a model of task segmentation sees images whole"),
    ],
)
def test_what_cannot_be_is_one_line(script, arguments, message, finished, few, tmp_path):
    where = [arguments[0], finished.run_dir] if script == "visualize.py" else [finished.run_dir, *arguments]
    code, _, err = commands.run(script, *where)
    assert (code, message in err) == (2, True)


def test_the_metrics_of_a_run_are_scikit_learns(finished, few):
    """Over all pixels, of the averaged weights at the last step."""
    model = tnt_jax.load_model(finished.run_dir, step=6)
    paths = sorted((few / "val/images").iterdir())
    found = np.stack([each["pred_mask"] for each in tnt_jax.inference_model(model, paths)])
    masks = np.stack([np.asarray(Image.open(path)) for path in sorted((few / "val/masks").iterdir())])
    last = [line for line in history(finished.run_dir) if line["kind"] == "test"][-1]
    wanted = jaccard_score(masks.ravel(), found.ravel(), average="macro")
    assert last["ema_miou"] == pytest.approx(wanted, abs=2e-3)
    assert last["ema_pixel_accuracy"] == pytest.approx((masks == found).mean(), abs=2e-3)


def test_windows_say_the_same_where_one_is_enough_and_cover_large_images(finished, few):
    model = tnt_jax.load_model(finished.run_dir)
    pixels = np.asarray(Image.open(few / "test/images/0000.png"))[..., None]
    (whole,) = predict_images(model, [pixels])
    logits = np.asarray(nnx.jit(lambda model: model((pixels[None] / 255 - 0.5) / 0.5))(model))[0]
    np.testing.assert_array_equal(whole["pred_mask"], logits.argmax(-1))
    large = np.tile(pixels, (2, 3, 1))[:100, :170]
    for zoom in (1.0, 2.6, 4.0):
        (found,) = predict_images(model, [large], zoom=zoom, batch_size=3)
        assert found["pred_mask"].shape == (100, 170)
        assert sum(found["pred_shares"].values()) == pytest.approx(1)
    with pytest.raises(InputError, match="zoom is 0, and must be above 0"):
        next(predict_images(model, [large], zoom=0))
    with pytest.raises(InputError, match="zoom is 2, and must be 1 for task single_label"):
        next(predict_images(small_model(), [large], zoom=2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": ModelChanges("tnt_s_patch16_224")},
            r"model\.head is class, and must be linear or mlp or mlp_words for data\.task segmentation",
        ),
        ({"data": {"task": "single_label"}}, r"model\.head is mlp, and must be class for data\.task single_label"),
        (
            {"data": {"mixup": 0.2}},
            r"data\.mixup is 0\.2, which only .* can have; for data\.task segmentation it must be 0",
        ),
        ({"data": {"label_smoothing": 0.1}}, r"data\.label_smoothing is 0\.1, which only"),
        ({"loss": LossConfig("cross_entropy")}, r"must be cross_entropy_dice or pixel_cross_entropy"),
        ({"loss": LossConfig(class_weights="balanced")}, r"loss\.class_weights is 'balanced', which only"),
        ({"best_metric": "top1"}, r"must be one of miou, pixel_accuracy, loss"),
        (
            {"data": {"task": "single_label", "ignore": (0,)}, "model": dataclasses.replace(SMALL, head="class")},
            r"data\.ignore is \(0,\), which only segmentation can have; for data\.task single_label it must be \(\)",
        ),
    ],
)
def test_what_a_configuration_cannot_have_is_said(changes, message, few):
    config = run_of("unused", few)
    given = {
        name: dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value
        for name, value in changes.items()
    }
    with pytest.raises(InputError, match=message):
        check(dataclasses.replace(config, **given))


@pytest.mark.slow
def test_digits_in_scenes_are_found(tmp_path):
    """At least 0.5 over the background and ten digits, after one look at 2,000 scenes."""
    write(tmp_path / "scenes", {"train": 2000, "val": 150})
    assert learned("digit_scenes", f"masks:{tmp_path}/scenes", tmp_path / "run", "--epochs", 1)["ema_miou"] >= 0.5


@pytest.mark.nightly
@pytest.mark.parametrize(
    "head",
    [("mlp",), ("linear", "--model.patch-size", 4, "--epochs", 6, "--optimizer.clip-norm", 1)],
    ids=["mlp", "linear"],
)
def test_digits_in_scenes_are_found_well(head, tmp_path):
    write(tmp_path / "scenes", {"train": 4000, "val": 300})
    scores = learned("digit_scenes", f"masks:{tmp_path}/scenes", tmp_path / "run", "--model.head", *head)
    assert scores["ema_miou"] >= 0.8


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("linear", "head is linear, which gives the classes of a patch from its last sentence"),
        ("mlp_words", "head mlp_words reads the words of a TNT's last block"),
    ],
)
def test_a_pyramid_has_no_head_of_a_tnt(head, message):
    with pytest.raises(InputError, match=message):
        tnt_jax.create_model("ptnt_ti_patch16_192", head=head)
