"""Images with boxes: COCO's JSON, Pascal VOC's XML, and tables with a line for each box.

A box is left, top, right, bottom in pixels of its image, its class, whether it stands for a crowd, and the area of what
is in it, which COCO's sizes go by.
"""

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from jaxtyping import Float, Int

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data.classes import read_class_names
from tnt_jax.data.decode import Reading
from tnt_jax.data.listing import FileNames
from tnt_jax.data.sources import ImageFiles, NoSplitError, Split, Target, names_of_split
from tnt_jax.data.tables import IMAGE_COLUMNS, read_table, rows_of

SLACK = 1.0
"""Pixels by which a box may reach beyond its image: annotators' tools round."""
logger = logging.getLogger(__name__)


class Annotated(NamedTuple):
    """An image of a source and its boxes."""

    path: str
    size: tuple[float, float] | None
    """Width and height as the source says them."""
    boxes: list[tuple]
    """(left, top, right, bottom, name of the class, whether it is a crowd, area or None, where it stands)."""


@dataclasses.dataclass(frozen=True)
class BoxedFiles(ImageFiles):
    """Image files, each with its boxes."""

    boxes: Float[np.ndarray, "boxes 7"]
    """Those of all images, one after the other."""
    ends: Int[np.ndarray, " images"]
    """The row in `boxes` at which those of an image end."""
    sizes: Float[np.ndarray, "images 2"]
    """Width and height of each image as the source says them, NaN where it does not."""
    tells = "boxes"

    def labelled(self, index: int) -> tuple[str, Float[np.ndarray, "boxes 7"]]:
        begin = self.ends[index - 1] if index else 0
        return self[index], self.boxes[begin : self.ends[index]]

    def check_size(self, index: int, target: Target, size: tuple[int, int]) -> None:
        height, width = size
        said = self.sizes[index]
        if np.isfinite(said).all() and tuple(said) != (width, height):
            raise InputError(
                f"{self.name(index)} is {width} x {height} pixels, and its boxes are said to be of {said[0]:g} x "
                f"{said[1]:g}"
            )
        over = (target[:, :2] < -SLACK).any(1) | (target[:, 2:4] > np.array([width, height]) + SLACK).any(1)
        if over.any():
            box = ", ".join(f"{value:g}" for value in target[over][0, :4])
            raise InputError(
                f"{self.name(index)} is {width} x {height} pixels, and has a box from {box} (left, top, right, bottom)"
            )

    @property
    def labels(self) -> np.ndarray:
        """No class of a whole image is told: all are alike."""
        return np.zeros(len(self), np.int32)

    def take(self, indices: np.ndarray) -> "BoxedFiles":
        each = np.split(self.boxes, self.ends[:-1])
        chosen = [each[index] for index in indices]
        return dataclasses.replace(
            self,
            names=self.names.take(indices),
            boxes=np.concatenate([np.zeros((0, 7), np.float32), *chosen]),
            ends=np.cumsum([len(boxes) for boxes in chosen], dtype=np.int64),
            sizes=self.sizes[indices],
        )

    def digest(self) -> str:
        whole = hashlib.sha256(super().digest().encode())
        for array in (self.boxes, self.ends):
            whole.update(array.tobytes())
        return whole.hexdigest()[:16]


def split_of(
    annotated: Sequence[Annotated], names: Sequence[str], folder: Path, data: DataConfig, split: str, place: str
) -> Split:
    """A split of images and their boxes, whose classes are numbered by `names`.

    Raises:
        InputError: a box is inverted or no number, or its class has no name.
    """
    number, rows, ends, flat = {name: index for index, name in enumerate(names)}, [], [], []
    for image in annotated:
        for left, top, right, bottom, name, crowd, area, at in image.boxes:
            given = f"{place}: {at} of {image.path} has the box {left:g}, {top:g}, {right:g}, {bottom:g}"
            if not all(map(math.isfinite, (left, top, right, bottom))) or right < left or bottom < top:
                raise InputError(f"{given}; left, top, right, bottom should rise")
            if name not in number:
                raise InputError(f"{given} of the class {name!r}, which is none of the {len(names)} that are named")
            if right == left or bottom == top:
                flat.append(f"{at} of {image.path}")
                continue
            area = (right - left) * (bottom - top) if area is None else area
            rows.append((left, top, right, bottom, number[name], crowd, area))
        ends.append(len(rows))
    if flat:
        logger.warning("%s: %d boxes without an area are left out, first %s", place, len(flat), flat[0])
    alone = sum(not image.boxes for image in annotated)
    if alone:
        logger.info("%s: %d of %d images of the split %s have no box", place, alone, len(annotated), split)
    sizes = [image.size or (math.nan, math.nan) for image in annotated]
    files = BoxedFiles(
        str(folder),
        FileNames([("", [image.path for image in annotated])]),
        np.array(rows, np.float32).reshape(-1, 7),
        np.array(ends, np.int64),
        np.array(sizes, np.float64).reshape(-1, 2),
    )
    return Split(files, None, tuple(names), split, Reading.of(data))


def _class_names(data: DataConfig, found: Iterable[str]) -> tuple[str, ...]:
    return tuple(read_class_names(data.class_names) if data.class_names else sorted(set(found)))


def _folder_of(candidates: Sequence[Path], path: str, place: str) -> Path:
    """The first folder that has an image. Raises InputError where none has it."""
    for folder in candidates:
        if (folder / path).is_file():
            return folder
    tried = ", ".join(str(each) for each in candidates)
    raise InputError(f"{place}: the image {path} is in none of {tried}")


def open_coco(argument: str, data: DataConfig, split: str) -> Split:
    """COCO's JSON: a file, or a folder with one for each split in it or in its folder `annotations`.

    Of a folder, `instances_train2017.json` is train and its images are in `train2017`; `images` and the folder itself
    are tried too. Numbers of categories may have gaps; classes are in their order.

    Raises:
        InputError: there is no such file or split, it is no COCO, or what it says of an image or a box is impossible.
    """
    root = Path(argument)
    if root.is_file():
        if split not in names_of_split(data.train_split):
            raise NoSplitError(split, [data.train_split])
        return _of_coco(root, root.parent, data, split)
    if not root.is_dir():
        raise InputError(f"there is no folder and no file {root}")
    files = {}
    for path in sorted([*root.glob("*.json"), *root.glob("annotations/*.json")]):
        words = path.stem.lower().removeprefix("instances_").replace("-", "_").split("_")
        for word in words:
            files.setdefault(word.rstrip("0123456789"), path)
    for name in names_of_split(split):
        if name in files:
            return _of_coco(files[name], root, data, name)
    known = [name for name in ("train", "validation", "test") if any(each in files for each in names_of_split(name))]
    raise NoSplitError(split, known)


def _read_json(path: Path) -> dict[str, list]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON: {error}") from error
    lacking = [
        name
        for name in ("images", "annotations", "categories")
        if not isinstance(content, dict) or not isinstance(content.get(name), list)
    ]
    if lacking:
        raise InputError(f"{path} is no COCO: it has no list {', '.join(lacking)}")
    return content


def _of_coco(path: Path, root: Path, data: DataConfig, split: str) -> Split:
    content = _read_json(path)

    def entry(kind: str, index: int, item: Any, fields: dict[str, Callable]) -> list:
        at = f"{path}: {kind}[{index}]"
        if not isinstance(item, dict):
            raise InputError(f"{at} is no object")
        for name, right in fields.items():
            if name not in item or not right(item[name]):
                raise InputError(f"{at} has {name} {_brief(item.get(name))}, which should be {RIGHT[right]}")
        return [item[name] for name in fields]

    names = {}
    for index, item in enumerate(content["categories"]):
        number, name = entry("categories", index, item, {"id": _whole, "name": _text})
        names[number] = name
    if len(set(names.values())) < len(content["categories"]):
        raise InputError(f"{path} has {len(content['categories'])} categories, and some of one number or one name")
    images: dict[int, Annotated] = {}
    for index, item in enumerate(content["images"]):
        number, file = entry("images", index, item, {"id": _whole, "file_name": _text})
        if number in images:
            raise InputError(f"{path}: images[{index}] has the id {number}, as one before it")
        size = tuple(item.get(name) for name in ("width", "height"))
        images[number] = Annotated(file, size if all(map(_number, size)) else None, [])
    if not images:
        raise InputError(f"{path} has no image")
    for index, item in enumerate(content["annotations"]):
        image, category, box = entry(
            "annotations", index, item, {"image_id": _whole, "category_id": _whole, "bbox": _four}
        )
        at = f"annotations[{index}]"
        for kind, number, known in (("image_id", image, images), ("category_id", category, names)):
            if number not in known:
                raise InputError(f"{path}: {at} has {kind} {number}, which no entry has")
        left, top, width, height = box
        area = item.get("area")
        crowd = bool(item.get("iscrowd", 0))
        images[image].boxes.append(
            (left, top, left + width, top + height, names[category], crowd, area if _number(area) else None, at)
        )
    classes = _class_names(data, ()) if data.class_names else tuple(names[number] for number in sorted(names))
    beside = [
        root / path.stem.removeprefix("instances_"),
        root / split / "images",
        root / split,
        root / "images" / split,
        root / "images",
        root,
    ]
    beside += [path.parent / "images", path.parent]
    annotated = list(images.values())
    return split_of(annotated, classes, _folder_of(beside, annotated[0].path, str(path)), data, split, str(path))


def _whole(value: Any) -> bool:
    return type(value) is int


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _four(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(map(_number, value))


RIGHT = {_whole: "a whole number", _text: "a text", _four: "four numbers: left, top, width, height"}


def _brief(value: Any) -> str:
    text = json.dumps(value, default=lambda _: "?")
    return text if len(text) <= 60 else f"{text[:59]}…"


def open_voc(argument: str, data: DataConfig, split: str) -> Split:
    """Pascal VOC: `Annotations/*.xml`, `JPEGImages` and, for splits, `ImageSets/Main/SPLIT.txt`.

    Without lists all images are of the training split. A box of what is called difficult is a crowd here: it is neither
    trained on nor missed.

    Raises:
        InputError: there is no such folder or split, or an annotation is damaged.
    """
    root = Path(argument)
    folder, lists = root / "Annotations", root / "ImageSets/Main"
    if not folder.is_dir():
        raise InputError(f"{root} has no folder Annotations, as Pascal VOC has")
    stems = sorted(path.stem for path in folder.glob("*.xml"))
    if not stems:
        raise InputError(f"{folder} has no .xml")
    name, training = split, stems
    there = {path.stem: path for path in lists.glob("*.txt")} if lists.is_dir() else {}
    own = next((each for each in names_of_split(split) if each in there), None)
    if own:
        name, stems = own, there[own].read_text().split()
        of_training = next((each for each in names_of_split(data.train_split) if each in there), own)
        training = there[of_training].read_text().split()
    elif there or split not in names_of_split(data.train_split):
        raise NoSplitError(split, sorted(there) or [data.train_split])
    annotated = {stem: _of_xml(folder / f"{stem}.xml") for stem in dict.fromkeys([*training, *stems])}
    classes = _class_names(data, (box[4] for stem in training for box in annotated[stem].boxes))
    chosen = [annotated[stem] for stem in stems]
    images = _folder_of([root / "JPEGImages", root / "images", root], chosen[0].path, str(folder))
    return split_of(chosen, classes, images, data, name, str(folder))


def _of_xml(path: Path) -> Annotated:
    try:
        root = ElementTree.parse(path).getroot()

        def text(element: ElementTree.Element, name: str) -> str:
            found = element.findtext(name)
            if not found:
                raise ValueError(f"it has no <{name}>")
            return found.strip()

        size = root.find("size")
        boxes = []
        for index, each in enumerate(root.iter("object")):
            box = each.find("bndbox")
            if box is None:
                raise ValueError(f"object {index} has no <bndbox>")
            # VOC counts pixels from 1, and the last one belongs to the box.
            left, top, right, bottom = (float(text(box, name)) for name in ("xmin", "ymin", "xmax", "ymax"))
            difficult = each.findtext("difficult", "0").strip() == "1"
            boxes.append((left - 1, top - 1, right, bottom, text(each, "name"), difficult, None, f"object {index}"))
        sides = None if size is None else tuple(float(text(size, name)) for name in ("width", "height"))
        return Annotated(text(root, "filename"), sides if sides and all(sides) else None, boxes)
    except FileNotFoundError:
        raise InputError(f"there is no annotation {path}") from None
    except (ElementTree.ParseError, ValueError) as error:
        raise InputError(f"{path} is no annotation of Pascal VOC: {error}") from error


SIDES = {"xmin": ("x0", "left"), "ymin": ("y0", "top"), "xmax": ("x1", "right"), "ymax": ("y1", "bottom")}
"""Columns of a table, and what else they are called."""
CLASS_COLUMNS = ("label", "class", "name", "category")


def open_box_table(argument: str, data: DataConfig, split: str) -> Split:
    """A table (CSV, TSV, Parquet) with a row for each box: image, xmin, ymin, xmax, ymax, label, in pixels.

    Paths are relative to the table. A row without a box is an image that has none. A column `split` says which rows are
    of a split; without one all are training images.

    Raises:
        InputError: there is no such table or split, or a cell is not what it should be.
    """
    table = read_table(argument, data.encoding)
    image = table.chosen(data.image_column, IMAGE_COLUMNS, "--data.image-column", required=True)
    given = data.label_columns[0] if data.label_columns else None
    label = table.chosen(given, CLASS_COLUMNS, "--data.label-columns", required=True)
    sides = [table.chosen(None, (name, *others), "") for name, others in SIDES.items()]
    if None in sides:
        raise InputError(f"{table.path} has no column {list(SIDES)[sides.index(None)]}; boxes need {', '.join(SIDES)}")
    split_column = table.chosen(data.split_column, ("split",), "--data.split-column")
    rows, training = (rows_of(table, split_column, name) for name in (split, data.train_split))
    if rows is None:
        raise NoSplitError(split, sorted(table.columns[split_column].texts if split_column else (data.train_split,)))
    cells = {name: np.array(table.columns[name].texts)[table.columns[name].codes] for name in (image, label, *sides)}
    images: dict[str, Annotated] = {}
    for row in rows.tolist():
        path, name, numbers = cells[image][row], cells[label][row], [cells[side][row] for side in sides]
        if not path or (any(numbers) and not name):
            raise InputError(f"{table.place(row)}: the image, or the class of its box, is missing")
        found = images.setdefault(str(path), Annotated(str(path), None, []))
        if any(numbers):
            try:
                box = tuple(map(float, numbers))
            except ValueError:
                said = ", ".join(numbers)
                raise InputError(f"{table.place(row)}: the box is {said}, and should be four numbers") from None
            found.boxes.append((*box, str(name), False, None, table.place(row)))
    trained = rows if training is None else training
    classes = _class_names(data, (str(name) for name in cells[label][trained] if name))
    name = table.columns[split_column].text_of(int(rows[0])) if split_column else data.train_split
    annotated, folder = list(images.values()), Path(table.path).absolute().parent
    return split_of(annotated, classes, _folder_of([folder], annotated[0].path, table.path), data, name, table.path)
