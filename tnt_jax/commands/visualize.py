"""Pictures of what a model does and of how a run went: `python visualize.py WHAT MODEL [IMAGE ...] --out FILE`."""

import dataclasses
import sys
from typing import Annotated, Literal

import tyro

from tnt_jax.commands.cli import command, parse_with_config
from tnt_jax.config import InputError

OF_IMAGES = ("why", "inner-attention", "outer-attention", "class-attention", "words", "features", "tsne")
OF_PREDICTIONS = ("confusion", "mistakes")
OF_CONFIGURATIONS = ("schedule", "batch")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Draws a picture. Blocks, rows and columns are counted from 0.

    Of images (without any, the first test image): why: what a class owes to each word;
    inner-attention: each word's attention inside a patch;
    outer-attention: a patch's attention over the image, in every block; class-attention: that of the class token, by
    head and rolled out over the depth; words: word embeddings where they lie in the image, in every block; features:
    channels of some blocks as maps; tsne: the last block's feature maps as points, or without an image all test images.
    Of a run: curves, also of several runs together; confusion and mistakes on its test images; schedule: its learning
    rate; batch: what it trains on. The last two also take a configuration, as configs/digits.py, and the flags of
    train.py behind it.
    """

    what: Annotated[
        Literal[(*OF_IMAGES, "curves", *OF_PREDICTIONS, *OF_CONFIGURATIONS)],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="WHAT"),
    ]
    """The picture to draw."""
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A folder of a run or a model, a published name, OWNER/NAME on the hub, an address, or a checkpoint file."""
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE ...")] = ()
    """Image files; of curves further runs."""
    out: str | None = None
    """File to write: .png, .pdf, .svg, .jpg or .webp; by default WHAT.png."""
    patch: tuple[int, int] | None = None
    """For inner- and outer-attention: row and column of the patch; by default the one in the middle."""
    block: int | None = None
    """For inner- and class-attention and grad-cam: the block; by default the last."""
    class_: Annotated[tuple[str, ...], tyro.conf.arg(name="class", metavar="NAME ...")] = ()
    """For why: classes by name or number, one row each; by default the predicted one."""
    method: tuple[str, ...] = ()
    """For why: rollout, grad-cam, integrated-gradients, one or several; by default rollout."""
    size: Literal["sentences", "words", "pixels"] | None = None
    """For why: of a place that has a number; by default words."""
    maps: str | None = None
    """For why: also write the maps to this file: .npy, (images and classes, methods, rows, columns)."""
    source: str | None = None
    """The source of test images, as for eval.py; a training run knows its own."""
    count: int = 24
    """For mistakes: how many."""
    table: str | None = None
    """For confusion: also write how many images of each class were taken for which to this file: .csv."""


@command
def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in OF_CONFIGURATIONS:
        _draw_configuration(sys.argv[1], sys.argv[2:])
        return
    arguments = tyro.cli(Arguments)
    from tnt_jax.visualize.canvas import check_out

    out = arguments.out or f"{arguments.what}.png"
    check_out(out)
    _refuse_what_is_not_used(arguments)
    if arguments.what == "curves":
        from tnt_jax.visualize.runs import compare_curves, curves

        runs = (arguments.model, *arguments.images)
        figure = compare_curves(runs) if len(runs) > 1 else curves(arguments.model)
    elif arguments.what in OF_IMAGES:
        figure = _of_images(arguments)
    else:
        figure = _of_predictions(arguments)
    figure.savefig(out)
    print(f"{out} shows {arguments.what} of {arguments.model}")


USED = {"patch": ("inner-attention", "outer-attention"), "block": ("why", "inner-attention", "class-attention")}
USED |= dict.fromkeys(("class_", "method", "size", "maps"), ("why",))
USED |= {"table": ("confusion",), "images": (*OF_IMAGES, "curves"), "source": (*OF_IMAGES, *OF_PREDICTIONS)}


def _refuse_what_is_not_used(arguments: Arguments) -> None:
    for name, pictures in USED.items():
        if getattr(arguments, name) not in (None, ()) and arguments.what not in pictures:
            flag = "an image" if name == "images" else f"--{name.rstrip('_')}"
            raise InputError(f"{flag} was given, and {arguments.what} has no use for it; {', '.join(pictures)} have")
    if arguments.count < 1:
        raise InputError(f"--count is {arguments.count}, and must be at least 1")


def _of_images(arguments: Arguments):
    from tnt_jax import visualize
    from tnt_jax.evaluation.evaluate import features_of, open_test, test_data
    from tnt_jax.storage.description import description_of
    from tnt_jax.storage.load import load_model

    model = load_model(arguments.model)
    images, task = list(arguments.images), description_of(model).outputs.task
    if not images:
        (data,) = test_data(arguments.model, [arguments.source] if arguments.source else [], task)
        source = open_test(data)
        if arguments.what == "tsne":
            features, labels = features_of(model, source, data)
            return visualize.image_tsne(features, labels, source.class_names)
        images = [source[0][0]]
    if arguments.what == "tsne":
        if len(images) > 1:
            raise InputError(f"tsne shows the feature maps of one image, and {len(images)} were given")
        return visualize.map_tsne(model, images[0])
    if arguments.what == "why":
        return _why(arguments, model, images)
    draw = getattr(visualize, arguments.what.replace("-", "_"))
    chosen = {name: getattr(arguments, name) for name in ("patch", "block") if arguments.what in USED[name]}
    return draw(model, images, **chosen)


def _why(arguments: Arguments, model, images: list):
    from tnt_jax.storage.files import check_ending
    from tnt_jax.visualize.why import draw_explanations, explained_images, write_maps

    if arguments.maps:
        check_ending(arguments.maps, (".npy",), "a file of maps")
    chosen = {"methods": arguments.method or ("rollout",), "size": arguments.size or "words"}
    if arguments.block is not None:
        chosen["block"] = arguments.block
    explanations = explained_images(model, images, classes=arguments.class_, **chosen)
    if arguments.maps:
        write_maps(explanations, arguments.maps)
    return draw_explanations(explanations, chosen["methods"])


def _of_predictions(arguments: Arguments):
    from tnt_jax import visualize
    from tnt_jax.commands.tables import write_rows
    from tnt_jax.evaluation.evaluate import open_test, predictions_of, test_data
    from tnt_jax.storage.description import description_of
    from tnt_jax.storage.files import check_ending
    from tnt_jax.storage.load import load_model
    from tnt_jax.tasks.table import TASKS

    if arguments.table:
        check_ending(arguments.table, (".csv",), "a table of a confusion matrix")
    model = load_model(arguments.model)
    task = description_of(model).outputs.task
    if arguments.table and not TASKS[task].has_probabilities:
        raise InputError(f"--table was given, and a {task} has no confusion matrix")
    (data,) = test_data(arguments.model, [arguments.source] if arguments.source else [], task)
    source = open_test(data)
    (predictions,) = predictions_of([model], source, data)
    if arguments.table:
        counts, _, rows, columns, *_ = predictions.confusion(source.class_names)
        named = [
            {"right class": row} | dict(zip(columns, each.tolist(), strict=True))
            for row, each in zip(rows, counts, strict=True)
        ]
        write_rows(arguments.table, named)
    if arguments.what == "confusion":
        return visualize.confusion(predictions, source.class_names, data=f"{data.source}, {source.name}")
    return visualize.mistakes(predictions, source, count=arguments.count, data=f"{data.source}, {source.name}")


@dataclasses.dataclass(frozen=True)
class OfConfiguration:
    """Draws the learning rate of a run (schedule), or a batch that it trains on (batch). Other flags are train.py's."""

    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG_OR_RUN")] = "digits"
    """A configuration by its name, a file like those in configs/, or the folder of a run."""
    out: str | None = None
    """File to write; by default schedule.png or batch.png."""
    step: int = 0
    """For batch: the one after this step."""
    count: int = 16
    """For batch: images of it."""


def _draw_configuration(what: str, arguments: list[str]) -> None:
    given, config = parse_with_config(OfConfiguration, arguments)
    from tnt_jax import visualize
    from tnt_jax.visualize.canvas import check_out

    out = given.out or f"{what}.png"
    check_out(out)
    if given.step < 0 or given.count < 1:
        raise InputError(f"--step is {given.step} and --count {given.count}; they start at 0 and at 1")
    figure = (
        visualize.schedule(config)
        if what == "schedule"
        else visualize.batch(config, step=given.step, count=given.count)
    )
    figure.savefig(out)
    print(f"{out} shows the {what} of {given.config}")
