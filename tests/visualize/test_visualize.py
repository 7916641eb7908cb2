import csv
import io
import json
import warnings
from pathlib import Path

import commands
import numpy as np
import pytest
from PIL import Image
from small_models import SMALL_PYRAMID, small_model, small_pyramid

import tnt_jax
from tnt_jax import visualize
from tnt_jax.config import InputError, OptimizerConfig, TrainConfig
from tnt_jax.data.listing import FileNames
from tnt_jax.data.sources import ImageFiles, Split
from tnt_jax.models.variants import abstract_model, model_config
from tnt_jax.storage.run import CONFIG_FILE
from tnt_jax.tasks.single_label import ClassPredictions
from tnt_jax.visualize.attention import attention_of, attention_rollout, outer_map
from tnt_jax.visualize.canvas import _families, colour_bar, new_figure, preprocess, shorten, show_map
from tnt_jax.visualize.tokens import embed, tiled

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)


def titles(figure):
    axes = [each for part in figure.subfigs for each in part.axes] or figure.axes
    return [each.get_title() for each in axes if each.get_visible() and each.get_label() != "<colorbar>"]


@pytest.fixture(scope="module")
def tnt():
    return small_model(depth=2)


@pytest.fixture(scope="module")
def pyramid():
    """One without parameters, for what is decided by its sizes."""
    return abstract_model(model_config(**SMALL_PYRAMID | {"image_size": 64}))


def test_rollout_is_the_product_of_averaged_attention_and_residual():
    half = np.array([[[0.5, 0.5], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]])  # the mean of its heads: .75 .25 / .5 .5
    once = np.array([[0.875, 0.125], [0.25, 0.75]])
    np.testing.assert_allclose(attention_rollout([half]), once)
    np.testing.assert_allclose(attention_rollout([half, half]), once @ once)


def test_words_are_tiled_as_they_lie_in_the_image():
    # 2 x 1 patches of 2 x 2 words, numbered row by row over the image
    image = np.arange(8).reshape(4, 2)
    patches = np.stack([image[:2].ravel(), image[2:].ravel()])[:, None]
    np.testing.assert_array_equal(tiled(patches), image)


def weights_of(*shapes):
    rng = np.random.default_rng(1)
    return [rng.random(shape) for shape in shapes]


def test_an_outer_map_is_the_row_of_the_patch_without_the_class_token(tnt):
    outer = weights_of((3, 5, 5), (3, 5, 5))  # 2 x 2 patches and the class token in front
    values = outer_map(tnt, outer, 1, (1, 0))
    np.testing.assert_allclose(values, outer[1].mean(axis=0)[1 + 2, 1:].reshape(2, 2))


def test_an_outer_map_of_a_pyramid_repeats_a_key_over_its_square_of_sentences(pyramid):
    outer = weights_of((2, 64, 4), (2, 16, 4), (2, 4, 4), (2, 1, 1))
    values = outer_map(pyramid, outer, 0, (2, 5))  # 8 x 8 sentences, 2 x 2 keys
    keys = outer[0].mean(axis=0)[2 * 8 + 5].reshape(2, 2)
    np.testing.assert_allclose(values, np.kron(keys, np.ones((4, 4))))
    # The third stage has 2 x 2 sentences with a key each; the patch lies in the one on the upper right.
    np.testing.assert_allclose(outer_map(pyramid, outer, 2, (2, 5)), outer[2].mean(axis=0)[1].reshape(2, 2))


@pytest.mark.nightly
def test_every_picture_of_a_pyramid():
    pyramid = small_pyramid(image_size=64)
    shapes = [weights.shape for weights in attention_of(pyramid, preprocess(pyramid, IMAGE))[1]]
    assert shapes == [(2, 64, 4), (2, 16, 4), (2, 4, 4), (2, 1, 1)]
    assert titles(visualize.outer_attention(pyramid, IMAGE))[-1] == "block 3, one key"
    assert titles(visualize.inner_attention(pyramid, IMAGE))[-1] == "block 3: each word's attention"
    assert titles(visualize.words(pyramid, IMAGE)) == ["image", *(f"block {block}" for block in range(4))]
    assert titles(visualize.features(pyramid, IMAGE))[::13] == ["block 0", "block 1", "block 3"]
    with pytest.raises(InputError, match="a single sentence"):
        visualize.map_tsne(pyramid, IMAGE)


def test_every_picture_has_its_panels(tnt):
    assert titles(visualize.outer_attention(tnt, IMAGE)) == ["patch 1 1", "block 0", "block 1"]
    heads = [f"block 1, head {head}" for head in range(3)]
    of_class = ["image", "block 1, mean", "all blocks, rollout", *heads]
    assert titles(visualize.class_attention(tnt, IMAGE)) == of_class
    assert titles(visualize.inner_attention(tnt, IMAGE, block=0))[-1] == "block 0: each word's attention"
    assert titles(visualize.words(tnt, IMAGE)) == ["image", "block 0", "block 1"]
    assert titles(visualize.features(tnt, IMAGE, blocks=(0, -1)))[::13] == ["block 0", "block 1"]


def test_several_images_stand_below_each_other(tnt):
    one, two = visualize.words(tnt, IMAGE), visualize.words(tnt, [IMAGE, IMAGE])
    assert len(two.subfigs) == 2
    assert two.get_figheight() == 2 * one.get_figheight()


def test_inner_attention_shows_the_weights_of_the_words(tnt):
    figure = visualize.inner_attention(tnt, IMAGE, patch=(1, 0), block=1)
    drawn = [np.asarray(image.get_array()).ravel() for image in figure.subfigs[0].axes[2].get_images()]
    weights = attention_of(tnt, preprocess(tnt, IMAGE))[0][1][1, 0].mean(axis=0)
    np.testing.assert_allclose(drawn, weights, rtol=1e-5)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda tnt, _: visualize.outer_attention(tnt, IMAGE, patch=(0, 2)), "patch 0 2 lies outside .* 2 rows and 2"),
        (lambda tnt, _: visualize.class_attention(tnt, IMAGE, block=2), "block 2 .* are 0, 1"),
        (lambda _, pyramid: visualize.class_attention(pyramid, IMAGE), "has no class token"),
        (lambda tnt, _: visualize.words(tnt, []), "no image was given"),
        (lambda tnt, _: visualize.features(tnt, IMAGE, blocks=(5,)), "blocks .* are out of range"),
        (lambda tnt, _: visualize.words(tnt, b"no image"), "cannot be read as an image"),
        (lambda *_: visualize.inner_attention(small_model(inner_blocks=()), IMAGE), "no block of this model has inner"),
    ],
)
def test_what_a_picture_cannot_show_is_refused(draw, message, tnt, pyramid):
    with pytest.raises(InputError, match=message):
        draw(tnt, pyramid)


ANSWERS = ClassPredictions(
    labels=np.array([0, 0, 1, 1, 2]),
    top=np.array([[0, 1], [1, 0], [1, 0], [2, 1], [2, 0]]),
    scores=np.array([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.7, 0.3], [0.9, 0.05]]),
    loss=np.zeros(5),
    images_per_second=1.0,
)
SOURCE = Split(np.zeros((5, 8, 8, 1), np.uint8), ANSWERS.labels, ("ant", "bee", "cat"))


def test_confusion_and_mistakes_show_what_was_taken_for_what():
    axes = visualize.confusion(ANSWERS, SOURCE.class_names).axes[0]
    np.testing.assert_allclose(axes.get_images()[0].get_array(), [[50, 50, 0], [0, 50, 50], [0, 0, 100]])
    assert titles(visualize.mistakes(ANSWERS, SOURCE)) == ["cat 70%\nis bee", "bee 60%\nis ant"]
    assert titles(visualize.mistakes(ANSWERS, SOURCE, count=1)) == ["cat 70%\nis bee"]
    right = ANSWERS.rescored([frozenset(range(3))] * 5)
    with pytest.raises(InputError, match="no mistakes: all 5"):
        visualize.mistakes(right, SOURCE)


def test_a_cell_has_its_number_of_images_and_a_mistake_its_file(tmp_path):
    axes = visualize.confusion(ANSWERS, SOURCE.class_names).axes[0]
    assert {text.get_position(): text.get_text() for text in axes.texts} == {
        (0, 0): "1", (1, 0): "1", (1, 1): "1", (2, 1): "1", (2, 2): "1",
    }  # fmt: skip
    names = ["a.png", "b.png", "c.png", "a-photograph-with-a-long-name-of-its-own.png", "e.png"]
    for name in names:
        Image.fromarray(IMAGE).save(tmp_path / name)
    images = ImageFiles(str(tmp_path), FileNames([("", names)]))
    found = titles(visualize.mistakes(ANSWERS, Split(images, ANSWERS.labels, SOURCE.class_names)))
    assert found == ["cat 70%\nis bee\na-photograp...-own.png", "bee 60%\nis ant\nb.png"]


def test_a_colour_of_a_map_means_the_same_over_black_and_white_and_in_the_bar():
    stripes = np.zeros((40, 40, 3), np.uint8)
    stripes[:, ::2] = 255
    values = np.repeat(np.linspace(0, 1, 8)[:, None], 8, axis=1)
    figure = new_figure(4, 4)
    axes = figure.subplots()
    colour_bar(figure, show_map(axes, values, stripes), axes, "share")
    shown = np.asarray(drawn(figure))[..., :3] / 255

    def pixels(of, x, y):
        column, row = of.transData.transform((x, y)).round().astype(int)
        return shown[shown.shape[0] - 1 - row, column]

    bar = figure.axes[1]
    for row, value in enumerate(values[:, 0]):
        over = np.array([pixels(axes, column + 0.5, 5 * row + 2.5) for column in range(40)])
        meant = pixels(bar, 0.5, np.clip(value, 0.02, 0.98))
        assert np.abs(over - meant).max() < 0.08
        assert np.abs(np.diff(over, axis=0)).max() > 0.05  # the image is still seen


def drawn(figure):
    """The figure as pixels, as it is drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.buffer_rgba()


def test_a_schedule_rises_falls_and_ends():
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_epochs=2, cooldown_epochs=1, min_learning_rate=1e-5)
    (line,) = visualize.schedule(TrainConfig(optimizer=optimizer, epochs=9)).axes[0].get_lines()[:1]
    epochs, rates = line.get_data()
    assert rates.max() == pytest.approx(1e-3, rel=0.15)
    assert 1.9 < epochs[rates.argmax()] < 2.1
    assert epochs[-1] == pytest.approx(10, abs=0.1)
    assert rates[-1] == pytest.approx(1e-5)


def test_curves_show_what_was_logged(tmp_path):
    (tmp_path / CONFIG_FILE).write_text("{}")
    with pytest.raises(InputError, match=r"metrics\.jsonl cannot be read"):
        visualize.curves(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="no line of training yet"):
        visualize.curves(tmp_path)
    train = [{"kind": "train", "epoch": n, "loss": 3 - n, "accuracy": n / 4, "learning_rate": 0.1} for n in (1, 2)]
    test = {"kind": "test", "epoch": 2, "ema_loss": 1, "raw_loss": 2, "ema_top1": 0.5, "raw_top1": 0.25}
    (tmp_path / "metrics.jsonl").write_text("\n".join([*map(json.dumps, [*train, test]), '{"kind": "tr']))
    loss, accuracy, rate = visualize.curves(tmp_path).axes
    assert [list(line.get_ydata()) for line in loss.get_lines()] == [[2, 1], [1], [2]]
    assert [list(line.get_ydata()) for line in accuracy.get_lines()] == [[25, 50], [50], [25]]
    assert [list(line.get_ydata()) for line in rate.get_lines()] == [[0.1, 0.1]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "small"
    tnt_jax.save_model(small_model(num_classes=10, in_channels=1), folder)
    return folder


def test_the_command_writes_pictures_of_images_and_of_test_images(folder, tmp_path):
    Image.fromarray(IMAGE).save(tmp_path / "a.png")
    for what, arguments in (
        ("class-attention", [tmp_path / "a.png"]),
        ("confusion", ["--source", "digits", "--table", tmp_path / "c.csv"]),
    ):
        code, out, err = commands.run("visualize.py", what, folder, *arguments, "--out", tmp_path / "out.png")
        assert code == 0, err
        assert f"out.png shows {what} of {folder}" in out
        assert np.asarray(Image.open(tmp_path / "out.png")).std() > 5
        Path(tmp_path / "out.png").unlink()
    rows = list(csv.DictReader((tmp_path / "c.csv").open()))
    assert [row["right class"] for row in rows] == list("0123456789")
    assert sum(int(value) for row in rows for name, value in row.items() if name != "right class") == 360


@pytest.mark.slow
def test_tsne_draws_maps_of_an_image_and_test_images(folder, tmp_path):
    Image.fromarray(IMAGE).save(tmp_path / "a.png")
    for arguments in ([tmp_path / "a.png"], ["--source", "digits"]):
        code, _, err = commands.run("visualize.py", "tsne", folder, *arguments, "--out", tmp_path / "out.png")
        assert code == 0, err
        assert np.asarray(Image.open(tmp_path / "out.png")).std() > 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["words", "MODEL"], "is not a training run, so --source must say"),
        (["words", "nowhere", "a.png"], "there is no folder nowhere"),
        (["words", "MODEL", "a.png", "--out", "a.doc"], "a picture ends in"),
        (["words", "MODEL", "a.png", "--out", "nowhere/a.png"], "there is no folder nowhere"),
        (["words", "MODEL", "nowhere.png"], "there is no image nowhere.png"),
        (["curves", "MODEL"], "is not the folder of a run"),
        (["curves", "MODEL", "a.png"], "is not the folder of a run"),
        (["schedule", "digits", "a.png"], "a.png"),
        (["words", "MODEL", "a.png", "--patch", "0", "0"], "inner-attention"),
        (["words", "MODEL", "a.png", "--count", "3"], "mistakes"),
        (["sentences", "MODEL"], "Available subcommands: why, inner-attention"),
        ([], "Missing subcommand"),
        (["mistakes", "MODEL", "--source", "digits", "--count", "0"], "--count is 0"),
        (["mistakes", "MODEL", "--table", "a.csv"], "confusion"),
        (["confusion", "MODEL", "--table", "a.txt"], "a.txt: a table of a confusion matrix ends in .csv"),
        (["schedule", "nowhere.py"], "there is no configuration nowhere.py"),
    ],
)
def test_the_command_refuses_what_it_cannot_draw(arguments, message, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [folder if argument == "MODEL" else argument for argument in arguments]
    code, out, err = commands.run("visualize.py", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "own"),
    [("words", []), ("inner-attention", ["--patch", "--block"]), ("confusion", ["--table"]), ("curves", [])],
)
def test_the_help_of_a_picture_shows_its_own_flags_alone(name, own):
    code, out, _ = commands.run("visualize.py", name, "--help")
    assert code == 0
    flags = ("--patch", "--block", "--class", "--method", "--size", "--maps", "--count", "--table", "--step")
    assert [flag for flag in flags if flag in out] == own
    assert "--out" in out


@pytest.mark.slow
def test_why_has_a_row_for_each_class_and_a_map_of_each_method(tnt, tmp_path):
    tnt_jax.save_model(tnt, tmp_path / "m", class_names=["cat", "dog", "fish"])
    model = tnt_jax.load_model(tmp_path / "m")
    figure = visualize.why(model, IMAGE, classes=["dog", 2], methods=("rollout", "integrated-gradients"), steps=2)
    assert [part.axes[0].get_title().partition(":")[0] for part in figure.subfigs] == ["dog", "fish"]
    assert [axes.get_title() for axes in figure.subfigs[0].axes[1:3]] == [
        "gradient-weighted rollout",
        "integrated gradients",
    ]
    assert [axes.get_ylabel() for axes in figure.subfigs[0].axes[3:]] == ["% of the whole", "logit, for and against"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--class", "dgo"], "the model has no class 'dgo'; did you mean 'dog'?"),
        (["--class", "7"], "the model has no class '7'; there are 3, counted from 0"),
        (["--method", "cam"], "there is no method 'cam'; there are rollout, grad-cam"),
        (["--block", "0"], "block was given, and rollout has no use for it"),
        (["--maps", "maps.txt"], "maps.txt"),
        (["--patch", "0", "0"], "inner-attention"),
    ],
)
def test_why_says_what_it_cannot_explain(flags, message, tnt, tmp_path):
    tnt_jax.save_model(tnt, tmp_path / "m", class_names=["cat", "dog", "fish"])
    Image.fromarray(IMAGE).save(tmp_path / "image.png")
    given = ("why", tmp_path / "m", tmp_path / "image.png", "--out", tmp_path / "why.png")
    code, _, err = commands.run("visualize.py", *given, *flags)
    assert code == 2
    assert message in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.png", "m"]


@pytest.mark.slow
def test_why_writes_its_maps(tnt, tmp_path):
    tnt_jax.save_model(tnt, tmp_path / "m")
    Image.fromarray(IMAGE).save(tmp_path / "image.png")
    flags = ("--out", tmp_path / "why.png", "--maps", tmp_path / "maps.npy", "--class", "0", "1")
    code, _, err = commands.run("visualize.py", "why", tmp_path / "m", tmp_path / "image.png", *flags)
    assert code == 0, err
    maps = np.load(tmp_path / "maps.npy")
    assert maps.shape == (2, 1, 8, 8)
    assert (maps >= 0).all()
    assert (tmp_path / "why.png").stat().st_size > 5000


def test_equal_features_are_no_picture():
    with pytest.raises(tnt_jax.InputError, match="the features of all 5 images are equal"):
        embed(np.ones((5, 8), np.float32))


def test_names_of_any_kind_and_length_are_drawn_as_they_are(caplog):
    """No formula, no traceback, no page of warnings, and a matrix that is more than a stamp."""
    names = ("$10-$20", "$\\frac$", "蚂蚁", "a" * 120, "b" * 60)
    labels = np.arange(len(names))
    predictions = ClassPredictions(labels, labels[:, None], np.ones((5, 1)), np.zeros(5), 1.0)
    figure = visualize.confusion(predictions, names, data="csv:a.csv, val")
    assert type(figure).__module__ == "matplotlib.figure"  # by which Gradio tells plots apart
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(io.BytesIO(), format="png")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [shorten(name) for name in names]
    assert not any(label.get_parse_math() for label in axes.get_yticklabels())
    assert figure.axes[0].get_title() == "csv:a.csv, val: 5 images, 100.00% right"
    width, height = axes.get_window_extent().size
    assert min(width, height) > 0.3 * figure.bbox.height
    assert "蚂蚁" in caplog.text or len(_families("蚂蚁")) > 1
    assert "findfont" not in caplog.text  # of matplotlib: that it does not know a font
