"""Features as files, and the images that are most similar."""

import commands
import numpy as np
import pytest
from pyarrow import parquet
from sklearn.datasets import make_blobs
from sklearn.metrics import average_precision_score
from sklearn.neighbors import NearestNeighbors
from small_models import small_model

import tnt_jax
from tnt_jax.evaluation.retrieval import retrieve


def test_the_nearest_are_scikit_learns_and_recall_and_precision_follow_from_them():
    features, labels = make_blobs(1100, 6, centers=30, cluster_std=3, random_state=0)
    labels[7] = 99  # the only one of its class is no query
    found = retrieve(features, labels, 3)
    theirs = NearestNeighbors(n_neighbors=4, metric="cosine").fit(features).kneighbors(features)[1][:, 1:]
    np.testing.assert_array_equal(found.nearest, theirs)
    others = labels != 99
    assert found.queries == others.sum()
    right = (labels[theirs] == labels[:, None]).any(axis=1)
    assert found.recall == pytest.approx(right[others].mean())
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    index = np.arange(len(labels))
    precisions = [
        average_precision_score(labels[index != query] == labels[query], (unit @ unit[query])[index != query])
        for query in index[others]
    ]
    assert found.mean_average_precision == pytest.approx(np.mean(precisions))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small"
    tnt_jax.save_model(small_model(in_channels=1, num_classes=10), path)
    return path


def test_the_command_writes_features_in_two_forms_and_finds_neighbours(model, tmp_path):
    files = [tmp_path / "a.npz", tmp_path / "a.parquet"]
    code, out, err = commands.run("tnt_jax/commands/embed.py", model, "digits", "--out", files[0])
    assert code == 0, err
    options = ["--neighbours", "5", "--picture", tmp_path / "a.png"]
    code, out, err = commands.run("tnt_jax/commands/embed.py", model, "digits", "--out", files[1], *options)
    assert code == 0, err
    assert "recall@5 " in out
    assert (tmp_path / "a.png").stat().st_size > 10_000
    arrays, table = np.load(files[0]), parquet.read_table(files[1])
    assert arrays["features"].shape == (360, 12)
    np.testing.assert_array_equal(np.stack(table["features"].to_numpy()), arrays["features"])
    np.testing.assert_array_equal(table["label"].to_numpy(), arrays["labels"])
    assert table["id"].to_pylist() == arrays["ids"].tolist()
    assert arrays["class_names"].tolist() == [str(digit) for digit in range(10)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits"], "neither --out nor --neighbours was given"),
        (["digits", "--out", "a.csv"], "a.csv: a file of features ends in .npz or .parquet"),
        (["digits", "--neighbours", "0"], "--neighbours is 0, and must be at least 1"),
        (["digits", "--out", "a.npz", "--picture", "a.png"], "--picture is of --neighbours"),
        (["--out", "a.npz"], "is not a training run, so --source must say"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(arguments, message, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = commands.run("tnt_jax/commands/embed.py", model, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert not list(tmp_path.iterdir())
