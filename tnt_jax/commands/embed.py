"""Features of images: `tnt-embed MODEL SOURCE --out FILE`, or `python -m tnt_jax.commands.embed`."""

import dataclasses
from typing import Annotated

import tyro

from tnt_jax.commands.cli import command
from tnt_jax.config import InputError

QUERIES = 8  # rows of the picture


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Writes the features of images, which the head of a model sees, and finds the most similar images.

    Features are the class token of a TNT, or the mean of a PyramidTNT's sentences, after the last norm. A run gives its
    averaged weights.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A folder of a run or a model, a published name, OWNER/NAME on the hub, an address, or a checkpoint file."""
    source: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")] = None
    """The source of images, as in --data.source of train.py; a training run knows its own."""
    split: str | None = None
    """Of the source, such as train; by default test, and where there is none, what training evaluated."""
    out: str | None = None
    """File to write: .npz or .parquet, with features (images, dim), labels, and ids, the names of the images."""
    neighbours: int | None = None
    """Print how often one of so many nearest images has the class (recall), and the mean average precision."""
    picture: str | None = None
    """For --neighbours: a picture of some images and their nearest, .png, .pdf or .svg."""
    batch_size: int = 64
    """Images that are computed together, over all devices."""


@command
def main() -> None:
    arguments = tyro.cli(Arguments, prog="tnt-embed")
    from tnt_jax.evaluation.evaluate import features_of, models_in, open_test, test_data
    from tnt_jax.storage.description import description_of
    from tnt_jax.storage.files import check_ending
    from tnt_jax.tasks.table import check_one_class

    if arguments.out is None and arguments.neighbours is None:
        raise InputError("neither --out nor --neighbours was given: there is nothing to do")
    if arguments.out:
        check_ending(arguments.out, (".npz", ".parquet"), "a file of features")
    if arguments.picture and arguments.neighbours is None:
        raise InputError("--picture is of --neighbours, which was not given")
    if arguments.picture:
        check_ending(arguments.picture, (".png", ".pdf", ".svg", ".jpg", ".webp"), "a picture")
    if arguments.neighbours is not None and arguments.neighbours < 1:
        raise InputError(f"--neighbours is {arguments.neighbours}, and must be at least 1")
    _, model = next(models_in(arguments.model))
    task = description_of(model).outputs.task
    if arguments.neighbours is not None:
        check_one_class(task, arguments.model, "--neighbours")
    (data,) = test_data(arguments.model, [arguments.source] if arguments.source else [], task)
    images = open_test(data, arguments.split)
    features, labels = features_of(model, images, data, batch_size=arguments.batch_size)
    print(f"{len(features):,} {images.name} images of {data.source}: features of {features.shape[1]} numbers")
    if arguments.out:
        _write(arguments.out, features, labels, images)
    if arguments.neighbours is not None:
        _find(arguments, features, labels, images)


def _write(path: str, features, labels, images) -> None:
    import numpy as np

    from tnt_jax.storage.files import write_whole

    ids = [images.image_name(index) for index in range(len(images))]

    def write(unfinished) -> None:
        if path.endswith(".npz"):
            with unfinished.open("wb") as file:
                np.savez(file, features=features, labels=labels, ids=np.array(ids), class_names=images.class_names)
            return
        import pyarrow as pa
        from pyarrow import parquet

        columns = {"id": ids, "label": list(labels), "features": list(features)}
        table = pa.table(columns).replace_schema_metadata({"class_names": "\n".join(images.class_names)})
        parquet.write_table(table, unfinished)

    write_whole(path, write)
    print(f"{path} has them")


def _find(arguments: Arguments, features, labels, images) -> None:
    import numpy as np

    from tnt_jax.evaluation.retrieval import retrieve
    from tnt_jax.tasks.metrics import proportion

    found = retrieve(features, labels, arguments.neighbours)
    recall, precision = (proportion("p").text(each) for each in (found.recall, found.mean_average_precision))
    print(f"recall@{arguments.neighbours} {recall}, mAP {precision}, over {found.queries:,} images")
    if arguments.picture:
        from tnt_jax.visualize.neighbours import neighbours

        queries = np.linspace(0, len(labels) - 1, min(QUERIES, len(labels))).astype(int)
        shown = found.nearest[:, :10]
        neighbours(images, queries, shown, labels, images.class_names).savefig(arguments.picture)
        print(f"{arguments.picture} shows {len(queries)} of them and their nearest")


if __name__ == "__main__":
    main()
