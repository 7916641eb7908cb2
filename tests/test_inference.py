import csv
import io
import json

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image
from small_models import small_model

import tnt_jax
from tnt_jax.config import InputError
from tnt_jax.data.crop import evaluation_crop
from tnt_jax.inference import predict_images, probabilities
from tnt_jax.storage.description import describe, description_of
from tnt_jax.tasks.table import TASKS
from tnt_jax.tasks.task import Outputs

NAMES = ("ant", "bee", "cat [spotted]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "small"
    tnt_jax.save_model(small_model(), folder, class_names=NAMES)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return tnt_jax.load_model(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(1)
    for index in range(5):
        pixels = rng.integers(0, 60 * index + 15, (40 + index, 50, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def test_inference_is_the_softmax_of_the_normalised_evaluation_crop(model, folder, photos):
    pixels = evaluation_crop(Image.open(photos / "3.png"), (32, 32), 0.9)
    normalised = (pixels[None].astype(np.float32) / 255 - 0.5) / 0.5
    logits = np.asarray(nnx.jit(lambda model, images: model(images))(model, normalised), np.float64)[0]
    expected = np.exp(logits) / np.exp(logits).sum()
    for source in (photos / "3.png", str(photos / "3.png"), (photos / "3.png").read_bytes()):
        result = tnt_jax.inference_model(model, source)
        assert list(result) == ["pred_label", "pred_class", "pred_score", "pred_scores"]
        assert result["pred_scores"].dtype == np.float32
        np.testing.assert_allclose(result["pred_scores"], expected, atol=1e-6)
        assert result["pred_label"] == expected.argmax()
        assert result["pred_class"] == NAMES[expected.argmax()]
        assert result["pred_score"] == result["pred_scores"].max()
    assert tnt_jax.inference_model(folder, photos / "3.png")["pred_score"] == result["pred_score"]


def test_an_array_gives_what_its_file_gives(model, photos):
    array = np.asarray(Image.open(photos / "1.png"))
    np.testing.assert_array_equal(
        tnt_jax.inference_model(model, array)["pred_scores"],
        tnt_jax.inference_model(model, photos / "1.png")["pred_scores"],
    )


def test_batches_give_what_single_images_give_in_their_order(model, photos):
    sources = [photos / "0.png", photos / "none.png", *(photos / f"{index}.png" for index in range(1, 5))]
    results = list(predict_images(model, sources, batch_size=2))
    assert isinstance(results.pop(1), InputError)
    for index, result in enumerate(results):
        alone = tnt_jax.inference_model(model, photos / f"{index}.png")
        np.testing.assert_allclose(result["pred_scores"], alone["pred_scores"], rtol=1e-5)


def test_images_are_asked_for_two_batches_ahead_and_no_further(model, photos):
    asked = []

    def endless():
        while True:
            asked.append(len(asked))
            yield photos / "0.png"

    results = predict_images(model, endless(), batch_size=3)
    assert not asked
    for _ in range(4):
        next(results)
    assert len(asked) == 9
    results.close()


def test_predict_writes_csv_in_order_and_says_that_classes_have_no_names(photos, tmp_path):
    tnt_jax.save_model(small_model(), tmp_path / "nameless")
    code, out, err = commands.run("predict.py", tmp_path / "nameless", photos, "--format", "csv", "--top-k", "2")
    assert code == 0
    assert "nameless has no class names: its classes are numbers" in err
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["image"] for row in rows] == [str(photos / f"{index}.png") for index in range(5)]
    result = tnt_jax.inference_model(tmp_path / "nameless", photos / "0.png")
    assert (rows[0]["label_1"], rows[0]["class_1"]) == (str(result["pred_label"]), result["pred_class"])
    assert float(rows[0]["score_1"]) == pytest.approx(result["pred_score"], rel=1e-5)
    assert float(rows[0]["score_1"]) >= float(rows[0]["score_2"])


def test_a_model_without_names_names_numbers_and_one_without_classes_is_refused(photos):
    result = tnt_jax.inference_model(small_model(), photos / "0.png")
    assert result["pred_class"] == str(result["pred_label"])
    with pytest.raises(InputError, match="num_classes=0"):
        tnt_jax.inference_model(small_model(num_classes=0), photos / "0.png")


def test_predict_prints_the_likeliest_classes(folder, photos):
    code, out, _ = commands.run("predict.py", folder, photos / "2.png", "--top-k", "2")
    assert code == 0
    assert str(photos / "2.png") in out
    assert sum(name in out for name in NAMES) == 2


def test_predict_computes_in_the_dtype_that_is_asked_for(folder, photos):
    scores = []
    for dtype in ("float32", "bfloat16"):
        code, out, err = commands.run("predict.py", folder, photos / "2.png", "--format", "jsonl", "--dtype", dtype)
        assert code == 0, err
        scores.append(json.loads(out)["pred_score"])
    assert scores[0] != scores[1]
    assert scores[0] == pytest.approx(scores[1], abs=0.02)


def test_predict_goes_on_after_bad_images_and_says_which(folder, photos, model, tmp_path):
    (tmp_path / "cut.png").write_bytes((photos / "4.png").read_bytes()[:300])
    code, out, err = commands.run(
        "predict.py", folder, tmp_path, "nowhere.jpg", photos, "--format", "jsonl", "--batch-size", "2"
    )
    assert code == 2
    assert "cut.png cannot be read as an image" in err
    assert "there is no image nowhere.jpg" in err
    assert "error: 2 of what was given could not be read" in err
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["image"] for line in lines] == [str(photos / f"{index}.png") for index in range(5)]
    for line in lines:
        result = tnt_jax.inference_model(model, line["image"])
        assert line["pred_class"] == result["pred_class"] == line["top"][0]["class"]
        assert line["top"][0]["score"] == pytest.approx(result["pred_score"], rel=1e-5)
        assert len(line["top"]) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "a.jpg"], "there is no folder nowhere"),
        (["nowhere"], "no images were given"),
        (["nowhere", "a.jpg", "--top-k", "0"], "top_k is 0, and must be at least 1"),
        (["nowhere", "a.jpg", "--colour"], "--colour"),
    ],
)
def test_predict_refuses_bad_arguments(arguments, message):
    code, out, err = commands.run("predict.py", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "given",
    [
        jnp.asarray,
        torch.tensor,
        lambda pixels: bytearray(_png(pixels)),
        lambda pixels: memoryview(_png(pixels)),
        lambda pixels: io.BytesIO(_png(pixels)),
        Image.fromarray,
    ],
    ids=["jax", "torch", "bytearray", "memoryview", "file", "pillow"],
)
def test_what_programs_have_in_hand_is_an_image(given, model):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    expected = tnt_jax.inference_model(model, pixels)["pred_scores"]
    np.testing.assert_array_equal(tnt_jax.inference_model(model, given(pixels))["pred_scores"], expected)


def _png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_a_list_of_images_gives_a_list(model, photos):
    paths = [photos / "1.png", str(photos / "2.png")]
    results = tnt_jax.inference_model(model, paths)
    assert [result["pred_label"] for result in results] == [
        tnt_jax.inference_model(model, path)["pred_label"] for path in paths
    ]
    assert tnt_jax.inference_model(model, []) == []
    with pytest.raises(InputError, match=r"there is no image .*none\.png"):
        tnt_jax.inference_model(model, [photos / "1.png", photos / "none.png"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "None is no image; one is a path, bytes"),
        (3, "3 is no image"),
        (np.zeros((3, 40, 50), np.uint8), r"its channels are first: transpose them, as in image\.transpose\(1, 2, 0\)"),
        (torch.full((40, 50, 3), 200.0), "its samples are float32 from 200 to 200, and what is white is not known"),
    ],
)
def test_what_is_no_image_is_said(given, message, model):
    with pytest.raises(InputError, match=message):
        tnt_jax.inference_model(model, given)


def test_any_number_of_images_compiles_a_model_a_few_times(photos):
    model = small_model(depth=2)  # of a form that no other test has
    before = probabilities._cache_size()
    pixels = np.zeros((32, 32, 3), np.uint8)
    for count in range(1, 10):
        assert len(list(predict_images(model, [pixels] * count, batch_size=4))) == count
    assert probabilities._cache_size() - before == 3  # 1, 2 and 4 images


def test_the_probability_of_a_single_output_is_its_sigmoid(photos):
    model = small_model(num_classes=1)
    pixels = evaluation_crop(Image.open(photos / "3.png"), (32, 32), 0.9)
    logit = float(model((pixels[None].astype(np.float32) / 255 - 0.5) / 0.5)[0, 0])
    result = tnt_jax.inference_model(model, photos / "3.png")
    assert result["pred_score"] == pytest.approx(1 / (1 + np.exp(-logit)), rel=1e-4)


def test_scores_that_are_not_numbers_are_an_error(photos):
    model = small_model()
    model.head.bias[...] = model.head.bias[...] * np.nan
    with pytest.raises(InputError, match=r"gives scores that are not numbers \(NaN\)"):
        tnt_jax.inference_model(model, photos / "0.png")


def test_products_of_a_prediction_are_those_of_a_cpu_on_every_platform():
    model = small_model(inner="reference")
    graph, state = nnx.split(model)
    given = graph, description_of(model).preprocessing, state, np.zeros((1, 32, 32, 3), np.uint8)
    program = str(jax.make_jaxpr(probabilities, static_argnums=(0, 1))(*given))
    products = program.count("dot_general[")
    assert products
    assert program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == products


def test_labels_are_answered_from_their_thresholds_on_and_numbers_are_in_units(photos, tmp_path):
    model = small_model()
    logits = np.array([0.4, -0.1, 2.0], np.float32)
    for name in ("kernel", "bias"):  # one prediction for every image
        parameter = getattr(model.head, name)
        parameter[...] = np.zeros(parameter.shape) if name == "kernel" else logits
    model.description = describe(model.config, class_names=NAMES, outputs=Outputs("multi_label"))
    result = tnt_jax.inference_model(model, photos / "0.png")
    np.testing.assert_allclose(result["pred_scores"], 1 / (1 + np.exp(-logits)), rtol=1e-6)
    assert (result["pred_labels"], result["pred_classes"]) == ([0, 2], ["ant", "cat [spotted]"])
    outputs = Outputs("multi_label", thresholds=(0.7, 0.4, 0.9))
    model.description = describe(model.config, class_names=NAMES, outputs=outputs)
    tnt_jax.save_model(model, tmp_path / "saved")
    assert tnt_jax.inference_model(tmp_path / "saved", photos / "0.png")["pred_classes"] == ["bee"]
    outputs = Outputs("regression", target_mean=(2000.0, 0.0, 5.0), target_std=(10.0, 1e-3, 1.0))
    model.description = describe(model.config, class_names=("year", "share", "x"), outputs=outputs)
    values = tnt_jax.inference_model(model, photos / "0.png")["pred_values"]
    assert values == pytest.approx({"year": 2004, "share": -1e-4, "x": 7}, rel=1e-6)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (Outputs("labels"), "outputs.task is 'labels', and should be one of single_label, multi_label, regression"),
        (Outputs("multi_label", thresholds=(0.5,)), "has one number for each of its 3 outputs"),
        (Outputs("single_label", thresholds=(0.5,) * 3), "outputs.thresholds is .*, and a model with task multi_label"),
        (Outputs("regression", target_mean=(0.0,) * 3), "has one of target_mean and target_std"),
        (Outputs("regression", target_mean=(0.0,) * 3, target_std=(1.0, 0.0, 1.0)), "outputs.target_std is"),
    ],
)
def test_outputs_that_no_model_has_are_refused(outputs, message):
    with pytest.raises(InputError, match=message):
        describe(small_model().config, outputs=outputs)


def test_the_page_shows_labels_with_a_tick_and_numbers_as_lines():
    result = {"pred_labels": [2], "pred_classes": [NAMES[2]], "pred_scores": np.array([0.1, 0.2, 0.9])}
    assert TASKS["multi_label"].shown(result, NAMES) == {"✓ cat [spotted]": 0.9, "bee": 0.2, "ant": 0.1}
    values = {"pred_values": {"year": 2004.0, "share": 0.1}}
    assert TASKS["regression"].shown(values, None) == "year: 2004\nshare: 0.1"


def test_a_card_says_what_outputs_mean():
    from tnt_jax.storage.publish import hub_config, model_card

    config, given = small_model().config, {"for_timm": True, "name": None, "results": (), "licence": None}
    described = describe(config, class_names=NAMES, outputs=Outputs("multi_label"))
    assert "each output is the logit of one, predicted from 0.5 on" in model_card(described, **given)
    assert hub_config(described, {})["problem_type"] == "multi_label_classification"
    outputs = Outputs("regression", target_mean=(2000.0, 0, 5), target_std=(10.0, 1, 1))
    card = model_card(describe(config, class_names=NAMES, outputs=outputs), **given)
    assert "3 targets, ant to cat [spotted]" in card
    assert "output * (10, 1, 1) + (2000, 0, 5)" in card
    assert "pipeline_tag" not in card


def test_a_label_at_its_threshold_is_predicted():
    outputs = Outputs("multi_label", (0.25, 0.75))
    assert TASKS["multi_label"].result(np.array([0.25, 0.7499]), outputs, ("a", "b"))["pred_labels"] == [0]
