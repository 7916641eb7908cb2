"""Datasets that TensorFlow Datasets prepared as ArrayRecord, read without TensorFlow."""

import dataclasses
import functools
import hashlib
import os
from typing import Any

import numpy as np

from tnt_jax.config import DataConfig, InputError
from tnt_jax.data.classes import read_class_names
from tnt_jax.data.decode import Reading, read_mask
from tnt_jax.data.masks import Meaning, class_numbers
from tnt_jax.data.sources import Images, NoSplitError, Split
from tnt_jax.tasks.table import TASKS

INSTALL = "pip install tensorflow-datasets array_record"


@dataclasses.dataclass(frozen=True)
class RecordImages(Images):
    """One split, or a slice of one, with an image and a label in each record."""

    title: str
    records: Any  # what TFDS calls a data source: records as dictionaries, the image as the bytes of a file
    classes: int
    known: str | None = None
    """A checksum of where the records lie."""

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> bytes:
        return self._record(index)["image"]

    def name(self, index: int) -> str:
        file_name = os.fsdecode(self._record(index).get("file_name") or b"")
        return f"record {index} of {self.title}" + (f" ({file_name})" if file_name else "")

    def digest(self) -> str | None:
        return self.known

    def labelled(self, index: int) -> tuple[bytes, int]:
        """An image and its class. Raises InputError where there is none."""
        record = self._record(index)
        label = int(record["label"])
        if label < 0:
            raise InputError(
                f"{self.name(index)} has label {label}: this split has no labels. Another one has: "
                "--data.eval-split validation"
            )
        if label >= self.classes:
            raise InputError(f"{self.name(index)} has label {label}, and there are {self.classes} classes")
        return record["image"], label

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """The classes of all records, which are all read for them once."""
        return np.array([self.labelled(index)[1] for index in range(len(self))], np.int32)

    def _record(self, index: int, target: str = "label") -> dict[str, Any]:
        """Raises InputError, with the shard and the place in it, where a record is damaged."""
        try:
            record = self.records[index]
            if record.get(target) is None or record.get("image") is None:
                raise ValueError(f"it has no image, or no {target.replace('_', ' ')}")
            return record
        except Exception as error:  # a cut shard, a flipped bit, other features: nearly everything is raised
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise InputError(f"record {index} of {self.title}{self._shard(index)} cannot be read: {reason}") from error

    def _shard(self, index: int) -> str:
        """The place of a record, in words; nothing where that is not known."""
        try:
            source = self.records.data_source
            reader, place = source._reader_idx_and_position(index)
            return f", record {place} of {os.path.basename(source._read_instructions[reader].filename)},"
        except Exception:  # what TFDS and array_record do not promise
            return ""


MASK = "segmentation_mask"


@dataclasses.dataclass(frozen=True)
class MaskedRecords(RecordImages):
    """Records with an image and its mask."""

    meaning: Meaning | None = None
    tells = "masks"

    def _record(self, index: int, target: str = MASK) -> dict[str, Any]:
        return super()._record(index, target)

    def labelled(self, index: int) -> tuple[bytes, np.ndarray]:
        name, record = f"the mask of {self.name(index)}", self._record(index)
        return record["image"], self.meaning.classes(read_mask(record[MASK], name=name), name)

    @property
    def labels(self) -> np.ndarray:
        """No class of a whole image is told: all are alike."""
        return np.zeros(len(self), np.int32)


def _masked(builder, tfds, name: str, data: DataConfig, split: str, records: Any) -> Split:
    known = _checksum(builder.info, split)
    if data.class_names:
        names = read_class_names(data.class_names)
    else:
        try:
            training = builder.as_data_source(split=data.train_split, decoders=_undecoded(tfds, ("image", MASK)))
        except ValueError as error:
            raise NoSplitError(data.train_split, sorted(builder.info.splits)) from error
        names = class_numbers([training[index][MASK] for index in range(len(training))], data)
    images = MaskedRecords(f"{name} {split}", records, len(names), known, Meaning(names, data.ignore))
    return Split(images, None, names, split, Reading.of(data))


def _undecoded(tfds, features: tuple[str, ...]) -> dict[str, Any]:
    return {feature: tfds.decode.SkipDecoding() for feature in features}


def open_tfds(name: str, data: DataConfig, split: str) -> Split:
    """A dataset in TFDS's folder (`~/tensorflow_datasets`, or `$TFDS_DATA_DIR`), by its name there."""
    tfds = _tensorflow_datasets()
    try:
        builder = tfds.builder(name)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise InputError(f"TFDS knows no dataset {name!r}: {str(error).splitlines()[0]}") from error
    except ModuleNotFoundError as error:
        raise InputError(
            f"dataset {name!r} is not prepared, and TFDS cannot prepare it without {error.name}"
        ) from error
    return _open(tfds, builder, f"tfds:{name}", data, split)


def open_array_record(folder: str, data: DataConfig, split: str) -> Split:
    """A folder with ArrayRecord shards and TFDS's description of them, as `tnt_jax.data.prepare` writes it."""
    tfds = _tensorflow_datasets()
    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # TFDS and protobuf raise nearly everything for damaged descriptions
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"{folder} holds no dataset: dataset_info.json, features.json and the shards should lie there ({reason})"
        ) from error
    return _open(tfds, builder, f"array_record:{folder}", data, split)


def _tensorflow_datasets():
    try:
        import array_record
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(f"tfds: and array_record: need {error.name}, which is not installed: {INSTALL}") from error
    del array_record
    return tfds


def _open(tfds, builder, name: str, data: DataConfig, split: str) -> Split:
    info = builder.info
    if not info.splits:
        raise InputError(f"{name} is not prepared: {builder.data_dir} holds no data")
    if info.file_format not in (tfds.core.FileFormat.ARRAY_RECORD, tfds.core.FileFormat.PARQUET):
        raise InputError(
            f"{name} is prepared as {info.file_format.value}, which cannot be read at random. Where TensorFlow is "
            f"installed, `tfds convert_format --dataset_version_dir={builder.data_dir} --out_file_format=array_record` "
            "adds a version that can"
        )
    dense = TASKS[data.task].told == "masks"
    target = MASK if dense else "label"
    if not {"image", target} <= set(info.features) or not (dense or hasattr(info.features[target], "names")):
        needed = target.replace("_", " ")
        raise InputError(f"{name} has the features {', '.join(info.features)}, and an image and a {needed} are needed")
    if split == "test" and "test" not in info.splits and "validation" in info.splits:
        split = "validation"
    try:
        encoded = ("image", MASK) if dense else ("image",)
        records = builder.as_data_source(split=split, decoders=_undecoded(tfds, encoded))
    except ValueError as error:
        raise NoSplitError(split, sorted(info.splits)) from error
    if dense:
        return _masked(builder, tfds, name, data, split, records)
    class_names = tuple(info.features["label"].names)
    images = RecordImages(f"{name} {split}", records, len(class_names), _checksum(info, split))
    return Split(images, None, class_names, split, Reading.of(data))


def _checksum(info, split: str) -> str | None:
    """Of the shards of a split, and what of each is read: labels are in the records, which are not read for it."""
    known = info.splits[split]
    shards = [(os.path.basename(each.filename), each.skip, each.take) for each in known.file_instructions]
    return hashlib.sha256(repr((info.full_name, info.dataset_size, shards)).encode()).hexdigest()[:16]
