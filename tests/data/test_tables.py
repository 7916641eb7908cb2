"""Tables as people have them: what is read, and what each fault is called."""

import dataclasses
import pickle

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data.check import content_of
from tnt_jax.data.opening import open_split
from tnt_jax.data.pipeline import epoch_order, train_recipe

NAMES = [f"photos/{number}.png" for number in range(12)]
PLAIN = "image,label\n" + "".join(f"{name},{'ab'[place % 2]}\n" for place, name in enumerate(NAMES))
SPLIT = "image,label,split\nphotos/0.png,a,train\nphotos/1.png,b,Train\nphotos/2.png,{},val\n"


@pytest.fixture
def table(tmp_path):
    (tmp_path / "photos").mkdir()
    for place, name in enumerate(NAMES):
        Image.new("RGB", (4, 4), (place, 0, 0)).save(tmp_path / name)

    def write(content, name="mine.csv", **fields):
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(content)
        return DataConfig(f"csv:{tmp_path / name}", **fields)

    return write


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (PLAIN, "mine.csv"),
        (PLAIN.replace(",", ";"), "mine.csv"),
        (PLAIN.replace(",", "\t"), "mine.tsv"),
        (b"\xef\xbb\xbf" + PLAIN.encode(), "mine.csv"),
        (PLAIN.encode("utf-16"), "mine.csv"),
        (PLAIN.replace("\n", "\r\n"), "mine.csv"),
        (PLAIN.replace("image,label", "Path,Class"), "mine.csv"),
    ],
)
def test_every_form_of_a_table_is_read(content, name, table, caplog):
    data = table(content, name)
    without_kind = dataclasses.replace(data, source=data.source.removeprefix("csv:"))
    source = open_split(data, "train")
    assert list(source.files) == list(open_split(without_kind, "train").files) == NAMES
    assert source.targets.tolist() == [0, 1] * 6
    assert source.class_names == ("a", "b")
    assert [source[place][0][0, 0, 0] for place in range(12)] == list(range(12))
    assert ("divided by ';'" in caplog.text) == (";" in str(content))


def test_parquet_is_read_and_numbers_are_classes_in_their_order(table, tmp_path):
    parquet.write_table(pa.table({"image": NAMES, "label": list(range(12, 0, -1))}), tmp_path / "mine.parquet")
    source = open_split(DataConfig(f"csv:{tmp_path / 'mine.parquet'}"), "train")
    assert source.class_names == tuple(map(str, range(1, 13)))
    assert source.targets.tolist() == list(range(11, -1, -1))


def test_several_labels_and_numbers(table):
    several = open_split(
        table("image,labels\nphotos/0.png,a|c\nphotos/1.png,\nphotos/2.png,b\n", task="multi_label"), "train"
    )
    assert several.class_names == ("a", "b", "c")
    assert several.targets.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert several.targets.dtype == several[0][1].dtype == np.float32
    marks = table("image,x,y,note\nphotos/0.png,0,1,n\nphotos/1.png,1,1,m\n", task="multi_label")
    assert open_split(marks, "train").targets.tolist() == [[0, 1], [1, 1]]
    numbers = open_split(table("image,x,y\nphotos/0.png,0.5,-1\nphotos/1.png,1e3,2\n", task="regression"), "train")
    assert numbers.class_names == ("x", "y")
    assert numbers.targets.tolist() == [[0.5, -1], [1000, 2]]


@pytest.mark.parametrize(
    ("content", "fields", "message"),
    [
        ("image,kind\nphotos/0.png,a\n", {}, "mine.csv has no column 'label' .*; it has 'image', 'kind'"),
        ("foto,label\nphotos/0.png,a\n", {}, "mine.csv has no column 'image' .*with --data.image-column"),
        (PLAIN, {"label_columns": ("klass",)}, "mine.csv has no column 'klass'; it has 'image', 'label'"),
        ("image,label\n" + "".join(f"no/{n}.png,a\n" for n in range(7)) + "photos/0.png,b\n", {},
         "line 2: 7 of 8 images are not there, .*no/0.png, no/1.png, no/2.png, no/3.png, no/4.png and 2 others"),
        ("image,label\nphotos/0.png,a\nphotos/1.png,\n", {}, "line 3: the cell of 'label' is empty"),
        ('image,label,note\nphotos/0.png,a,"x\ny"\nphotos/1.png,,z\n', {}, "line 4: the cell of 'label' is empty"),
        ("image,label\nphotos/0.png,a\n,b\n", {}, "line 3: the cell of 'image' is empty"),
        ("image,label\nphotos/0.png,a\nphotos/1.png,b\nphotos/0.png,b\n", {},
         "line 4: photos/0.png is there for the second time, first in .*line 2"),
        ("image,label\nphotos/0.png,gr\xfcn\n".encode("latin-1"), {}, r"line 2: b'gr\\xfcn' .* is not UTF-8"),
        ("image,label\nphotos/0.png,a\nphotos/1.png\n", {}, "line 3 has 1 cells, and the first line 2"),
        ("", {}, "is empty; its first line should name the columns"),
        ("image,label\n", {}, "has no rows"),
        ("image,target\nphotos/0.png,1\nphotos/1.png,nan\n", {"task": "regression"},
         "line 3: the cell of 'target' is 'nan', and should be a finite number"),
        ("image,x,y\nphotos/0.png,1,0\nphotos/1.png,1,2\n", {"task": "multi_label", "label_columns": ("x", "y")},
         "line 3: the cell of 'y' is 2, and should be 1 where"),
        (SPLIT.format("c"), {}, "line 4: no training image has label 'c'; --data.other-classes allows"),
        (SPLIT.format(""), {}, "line 4: the cell of 'label' is empty"),
        (PLAIN, {"fold": "5/3"}, "data.fold is '5/3', and must be K/N"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_file_line_and_value(content, fields, message, table):
    with pytest.raises(InputError, match=message) as raised:
        open_split(table(content, **fields), "train")
    assert "mine.csv" in str(raised.value) or "data.fold" in message


def test_a_label_that_is_in_no_list_is_named_and_the_list_gives_the_order(table, tmp_path):
    (tmp_path / "names.txt").write_text("b\na\nnever seen\n")
    data = table(PLAIN, class_names=str(tmp_path / "names.txt"))
    assert open_split(data, "train").class_names == ("b", "a", "never seen")
    (tmp_path / "names.txt").write_text("b\n")
    with pytest.raises(InputError, match=r"mine.csv, line 2: label 'a' in column 'label' is none of the 1 classes of"):
        open_split(data, "train")


def test_an_encoding_that_is_named_is_read(table):
    data = table("image,label\nphotos/0.png,gr\xfcn\n".encode("latin-1"), encoding="latin-1")
    assert open_split(data, "train").class_names == ("grün",)


def test_measurements_are_no_classes(table, tmp_path):
    names = []
    for number in range(30):
        names.append(f"photos/m{number}.png")
        (tmp_path / names[-1]).touch()
    rows = "".join(f"{name},{place}.5\n" for place, name in enumerate(names))
    with pytest.raises(InputError, match=r"30 different numbers such as 0.5, which are no classes; --data.task"):
        open_split(table(f"image,label\n{rows}"), "train")


def test_a_file_name_that_is_not_utf8_is_read(table, tmp_path):
    Image.new("L", (3, 3), 7).save(tmp_path / "photos/\udcff.png", "PNG")
    source = open_split(table(b"image,label\nphotos/\xff.png,a\n"), "train")
    assert source.files[0] == "photos/\udcff.png"
    assert source[0][0].tolist() == [[[7]] * 3] * 3


def test_splits_come_from_a_column_and_may_be_held_out(table):
    data = table(SPLIT.format("a"))
    assert [list(open_split(data, split).files) for split in ("train", "test")] == [NAMES[:2], NAMES[2:3]]
    data = table(PLAIN)
    with pytest.raises(InputError, match=r"there is no split 'test'; there are 'train'; --data.holdout 0.2"):
        open_split(data, "test")
    held = dataclasses.replace(data, holdout=0.25)
    train, test = (open_split(held, split) for split in ("train", None))
    assert sorted([*train.files, *test.files]) == sorted(NAMES)
    assert len(test) == 3
    assert content_of(train) != content_of(test)
    again = pickle.loads(pickle.dumps(test))
    assert list(again.files) == list(test.files)
    np.testing.assert_array_equal(again[1][0], test[1][0])


@pytest.mark.parametrize("seed", range(5))
def test_groups_and_folds_are_compared_without_the_blanks_around_them(seed, table):
    rows = "".join(f"{name},a,patient {place // 4}{' ' * (place % 2)}\n" for place, name in enumerate(NAMES))
    data = table("image,label,group\n" + rows, holdout=0.4, split_seed=seed)
    train, test = (open_split(data, split).groups for split in ("train", None))
    assert len({*train, *test}) == 3
    assert not set(train) & set(test)


def test_folds_of_a_column_are_numbered_as_numbers(table):
    rows = "".join(f"{name},a,{place}{' ' * (place % 2)}\n" for place, name in enumerate(NAMES))
    data = table("image,label,fold\n" + rows)
    assert open_split(data, "train").folds.tolist() == list(range(12))
    for fold in ("3/12", "11/12"):
        test = open_split(dataclasses.replace(data, fold=fold), None)
        assert list(test.files) == [NAMES[int(fold.partition("/")[0]) - 1]]


@pytest.mark.parametrize(
    "again", ["./photos/0.png", "photos//0.png", "photos/../photos/0.png", "{folder}/photos/0.png"]
)
def test_a_file_under_two_spellings_is_one(again, table, tmp_path):
    again = again.format(folder=tmp_path)
    data = table(f"image,label,split\nphotos/0.png,a,train\nphotos/1.png,a,train\n{again},a,test\n")
    with pytest.raises(InputError, match=r"line 4: .*0.png is there for the second time, first in .*mine.csv, line 2"):
        open_split(data, "train")
    alone = table(f"image,label\n{again},a\n")
    assert open_split(alone, "train")[0][0].shape == (4, 4, 3)


def test_the_index_of_a_table_is_shared_and_small(tmp_path):
    (tmp_path / "a").mkdir()
    names = [f"a/photograph_{number:05}.jpg" for number in range(20_000)]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "mine.csv").write_text("image,label\n" + "".join(f"{name},{len(name)}\n" for name in names))
    source = open_split(DataConfig(f"csv:{tmp_path / 'mine.csv'}"), "train")
    shared = []
    copied = pickle.dumps(source, protocol=5, buffer_callback=shared.append)
    assert len(copied) < 2000
    assert sum(part.raw().nbytes for part in shared) < 40 * len(names)


def test_an_image_is_drawn_as_often_as_its_weight_says(table):
    weights = [0, 1, 2, 3] * 3
    rows = "".join(f"{name},{'ab'[place % 2]},{weights[place]}\n" for place, name in enumerate(NAMES))
    data = table("image,label,weight\n" + rows)
    source = open_split(data, "train")
    assert source.targets.shape == (12,)
    recipe = train_recipe(source, data, image_size=(4, 4), channels=3, batch_size=4, seed=0)
    drawn = np.mean(
        [np.bincount(epoch_order(12, 0, epoch, recipe.shares), minlength=12) for epoch in range(400)], axis=0
    )
    np.testing.assert_allclose(drawn, np.array(weights) / np.mean(weights), atol=0.1)
    assert not drawn[::4].any()
    parts = open_split(dataclasses.replace(data, holdout=0.5), "train")
    assert parts.weights.tolist() == [weights[NAMES.index(name)] for name in parts.files]
    assert content_of(source) != content_of(dataclasses.replace(source, weights=source.weights + 1))


@pytest.mark.parametrize(
    ("weight", "message"), [("-1", "line 2: the weight is -1"), ("x", "line 2: the cell of 'weight'")]
)
def test_a_weight_that_means_nothing_is_named(weight, message, table):
    with pytest.raises(InputError, match=message):
        open_split(table(f"image,label,weight\nphotos/0.png,a,{weight}\nphotos/1.png,b,1\n"), "train")


def test_weights_that_are_all_0_leave_nothing_to_train_on(table):
    with pytest.raises(InputError, match="every weight in column 'weight' is 0, so no image is ever drawn"):
        open_split(table("image,label,weight\nphotos/0.png,a,0\nphotos/1.png,b,0\n"), "train")
