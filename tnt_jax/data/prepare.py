"""ImageNet from its official archives to ArrayRecord, without TensorFlow.

    python -m tnt_jax.commands.prepare imagenet --train TRAIN.tar --val VAL.tar --out FOLDER

FOLDER then holds `imagenet2012/5.1.0`, which `array_record:FOLDER/imagenet2012/5.1.0` reads, and `tfds:imagenet2012`
where TFDS_DATA_DIR is FOLDER. The files of the images are kept as they are. A run that was stopped goes on where it
was.
"""

import contextlib
import dataclasses
import io
import pathlib
import tarfile
from collections.abc import Callable, Iterable, Iterator

import rich.progress

from tnt_jax.config import InputError
from tnt_jax.data.records import INSTALL


@dataclasses.dataclass(frozen=True)
class Archives:
    """The content that the two archives should have."""

    class_names: tuple[str, ...]
    """In the order of their labels. Each is the name of an archive within that of the training images."""
    validation_classes: tuple[str, ...]
    """Class names of the validation images, in the order of their file names."""
    train_count: int
    """Training images of all classes."""
    shard_size: int = 1000
    """Validation images in a shard. A class is a shard of the training images."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file that is still to be written, and what goes into it: file name, content and label of each image."""

    path: pathlib.Path
    read: Callable[[], Iterable[tuple[str, bytes, str]]]


def imagenet_archives() -> Archives:
    """The lists that TFDS ships. Raises InputError if it is not installed."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(f"preparing ImageNet needs {error.name}, which is not installed: {INSTALL}") from error
    lists = tfds.core.tfds_path("datasets/imagenet2012")
    names = tuple((lists / "labels.txt").read_text().split())
    return Archives(names, tuple((lists / "validation_labels.txt").read_text().split()), train_count=1_281_167)


def prepare_imagenet(train: str, val: str, out: str, archives: Archives, name: str = "imagenet2012") -> pathlib.Path:
    """Writes `out/NAME/5.1.0` and returns it.

    Raises:
        InputError: an archive is missing or damaged, or does not hold what it should. Shards that were complete by then
            stay, and are not written again.
    """
    folder = pathlib.Path(out) / name / "5.1.0"
    folder.mkdir(parents=True, exist_ok=True)
    info = _describe(folder, name, archives)
    with contextlib.ExitStack() as stack, rich.progress.Progress() as progress:
        shards = {
            "train": _train_shards(stack.enter_context(_open_archive(train)), folder, name, archives),
            "validation": _validation_shards(stack.enter_context(_open_archive(val)), folder, name, archives),
        }
        lengths = {}
        for split, split_shards in shards.items():
            bar = progress.add_task(f"{split} shards", total=len(split_shards))
            lengths[split] = []
            for shard in split_shards:
                try:
                    lengths[split].append(_write(shard, info))
                except OSError as error:
                    raise InputError(f"a shard of {split} images cannot be written into {folder}: {error}") from error
                progress.advance(bar)
    for split, expected in (("train", archives.train_count), ("validation", len(archives.validation_classes))):
        if sum(lengths[split]) != expected:
            raise InputError(f"{sum(lengths[split])} {split} images were found, and there should be {expected}")
    _finish(info, folder, name, lengths)
    return folder


@contextlib.contextmanager
def _open_archive(path: str) -> Iterator[tarfile.TarFile]:
    try:
        archive = tarfile.open(path, "r:")  # noqa: SIM115, closed below
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"{path} cannot be read as a tar archive: {error}") from error
    with archive:
        try:
            yield archive
        except tarfile.TarError as error:
            raise InputError(f"{path} cannot be read as a tar archive: {error}") from error


def _shard_path(folder: pathlib.Path, name: str, split: str, index: int, count: int) -> pathlib.Path:
    return folder / f"{name}-{split}.array_record-{index:05}-of-{count:05}"


def _train_shards(archive: tarfile.TarFile, folder: pathlib.Path, name: str, archives: Archives) -> list[Shard]:
    members = {member.name.removesuffix(".tar"): member for member in archive if member.isfile()}
    if members.keys() != set(archives.class_names):
        differing = sorted(members.keys() ^ set(archives.class_names))
        raise InputError(
            f"{archive.name} should hold an archive for each of {len(archives.class_names)} classes, and differs in "
            f"{len(differing)}: {', '.join(differing[:5])}"
        )

    def images(class_name: str) -> Iterator[tuple[str, bytes, str]]:
        content = io.BytesIO(archive.extractfile(members[class_name]).read())
        with tarfile.open(fileobj=content, mode="r:") as inner:
            for member in sorted(filter(tarfile.TarInfo.isfile, inner), key=lambda member: member.name):
                yield member.name, inner.extractfile(member).read(), class_name

    count = len(archives.class_names)
    return [
        Shard(_shard_path(folder, name, "train", index, count), lambda class_name=class_name: images(class_name))
        for index, class_name in enumerate(archives.class_names)
    ]


def _validation_shards(archive: tarfile.TarFile, folder: pathlib.Path, name: str, archives: Archives) -> list[Shard]:
    members = sorted(filter(tarfile.TarInfo.isfile, archive), key=lambda member: member.name)
    if len(members) != len(archives.validation_classes):
        raise InputError(
            f"{archive.name} holds {len(members)} images, and there should be {len(archives.validation_classes)}"
        )

    def images(part: slice) -> Iterator[tuple[str, bytes, str]]:
        for member, class_name in zip(members[part], archives.validation_classes[part], strict=True):
            yield member.name, archive.extractfile(member).read(), class_name

    parts = [slice(at, at + archives.shard_size) for at in range(0, len(members), archives.shard_size)]
    return [
        Shard(_shard_path(folder, name, "validation", index, len(parts)), lambda part=part: images(part))
        for index, part in enumerate(parts)
    ]


def _write(shard: Shard, info) -> int:
    """Writes a shard unless it is there already, and returns how many images it holds."""
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    if not shard.path.exists():
        unfinished = shard.path.with_name(f"unfinished-{shard.path.name}")
        # A record at a time, so that one can be read without its neighbours.
        writer = ArrayRecordWriter(str(unfinished), "group_size:1")
        for file_name, content, class_name in shard.read():
            if not content.startswith((b"\xff\xd8\xff", b"\x89PNG")):
                raise InputError(f"{file_name} of {class_name} is neither a JPEG nor a PNG")
            example = {"image": content, "label": class_name, "file_name": pathlib.PurePath(file_name).name}
            writer.write(info.features.serialize_example(info.features.encode_example(example)))
        writer.close()
        unfinished.rename(shard.path)  # so that a shard with its own name is a complete one
    reader = ArrayRecordReader(str(shard.path))
    try:
        return reader.num_records()
    finally:
        reader.close()


def _describe(folder: pathlib.Path, name: str, archives: Archives):
    """The description by which TFDS reads the shards."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.dataset_info import DatasetIdentity

    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=archives.class_names),
            "file_name": tfds.features.Text(),
        }
    )
    identity = DatasetIdentity(
        name=name, version=tfds.core.Version("5.1.0"), data_dir=str(folder), module_name="tnt_jax.data.prepare"
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features, supervised_keys=("image", "label"))
    info.set_file_format("array_record")
    return info


def _finish(info, folder: pathlib.Path, name: str, lengths: dict[str, list[int]]) -> None:
    """Writes the description, last, so that a folder that has one is complete."""
    from tensorflow_datasets.core.naming import ShardedFileTemplate
    from tensorflow_datasets.core.splits import SplitDict, SplitInfo

    template = ShardedFileTemplate(dataset_name=name, data_dir=folder, filetype_suffix="array_record")
    splits = []
    for split, shard_lengths in lengths.items():
        size = sum(path.stat().st_size for path in folder.glob(f"{name}-{split}.*"))
        splits.append(SplitInfo(name=split, shard_lengths=shard_lengths, num_bytes=size, filename_template=template))
    info.set_splits(SplitDict(splits))
    info.write_to_directory(folder)
