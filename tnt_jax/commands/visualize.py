"""Pictures of what a model does and of how a run went: `python visualize.py PICTURE MODEL [IMAGE ...] --out FILE`."""

import dataclasses
import sys
from typing import Annotated, Literal

import tyro

from tnt_jax.commands.cli import command, parse_with_config
from tnt_jax.config import InputError, ModelChanges, TrainConfig

Block = Annotated[int | None, tyro.conf.arg(metavar="N")]
Patch = Annotated[tuple[int, int] | None, tyro.conf.arg(metavar="ROW COLUMN")]


@dataclasses.dataclass(frozen=True)
class OfModel:
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A folder of a run or a model, a published name, OWNER/NAME on the hub, an address, or a checkpoint file."""
    out: str | None = None
    """File to write: .png, .pdf, .svg, .jpg or .webp; by default PICTURE.png."""
    source: str | None = None
    """The source of test images, as for eval.py; a training run knows its own."""

    @property
    def subject(self) -> str:
        return self.model

    def load(self):
        from tnt_jax.storage.load import load_model

        return load_model(self.model)

    def test_split(self, model):
        """The configuration of the test images and their split."""
        from tnt_jax.evaluation.evaluate import open_test, test_data
        from tnt_jax.storage.description import description_of

        task = description_of(model).outputs.task
        (data,) = test_data(self.model, [self.source] if self.source else [], task)
        return data, open_test(data)


@dataclasses.dataclass(frozen=True)
class OfImages(OfModel):
    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE ...")] = ()
    """Image files; without any, the first test image."""

    def load_with_images(self):
        model = self.load()
        return model, list(self.images) or [self.test_split(model)[1][0][0]]


@dataclasses.dataclass(frozen=True)
class Why(OfImages):
    """Shows what a class owes to each word."""

    block: Block = None
    """For grad-cam: the block, from 0; by default the last."""
    class_: Annotated[tuple[str, ...], tyro.conf.arg(name="class", metavar="NAME ...")] = ()
    """Classes by name or number, one row each; by default the predicted one."""
    method: tuple[str, ...] = ("rollout",)
    """rollout, grad-cam, integrated-gradients, one or several."""
    size: Literal["sentences", "words", "pixels"] = "words"
    """The size of a place that has a number."""
    maps: str | None = None
    """Also write the maps to this file: .npy, (images and classes, methods, rows, columns)."""

    def draw(self, visualize):
        from tnt_jax.storage.files import check_ending
        from tnt_jax.visualize.why import draw_explanations, explained_images, write_maps

        if self.maps:
            check_ending(self.maps, (".npy",), "a file of maps")
        model, images = self.load_with_images()
        chosen = {"classes": self.class_, "methods": self.method, "size": self.size}
        chosen |= {} if self.block is None else {"block": self.block}
        explanations = explained_images(model, images, **chosen)
        if self.maps:
            write_maps(explanations, self.maps)
        return draw_explanations(explanations, self.method)


@dataclasses.dataclass(frozen=True)
class InnerAttention(OfImages):
    """Shows each word's attention inside a patch."""

    patch: Patch = None
    """Row and column of the patch, from 0; by default the one in the middle."""
    block: Block = None
    """The block, from 0; by default the last."""

    def draw(self, visualize):
        return visualize.inner_attention(*self.load_with_images(), patch=self.patch, block=self.block)


@dataclasses.dataclass(frozen=True)
class OuterAttention(OfImages):
    """Shows a patch's attention over the image, in every block."""

    patch: Patch = None
    """Row and column of the patch, from 0; by default the one in the middle."""

    def draw(self, visualize):
        return visualize.outer_attention(*self.load_with_images(), patch=self.patch)


@dataclasses.dataclass(frozen=True)
class ClassAttention(OfImages):
    """Shows the attention of the class token over the image, by head and rolled out over the depth."""

    block: Block = None
    """The block, from 0; by default the last."""

    def draw(self, visualize):
        return visualize.class_attention(*self.load_with_images(), block=self.block)


@dataclasses.dataclass(frozen=True)
class Words(OfImages):
    """Shows word embeddings where they lie in the image, in every block."""

    def draw(self, visualize):
        return visualize.words(*self.load_with_images())


@dataclasses.dataclass(frozen=True)
class Features(OfImages):
    """Shows channels of some blocks as maps."""

    def draw(self, visualize):
        return visualize.features(*self.load_with_images())


@dataclasses.dataclass(frozen=True)
class Tsne(OfModel):
    """Shows the last block's feature maps of an image as points, or without an image all test images."""

    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")] = ()
    """An image file; without one, all test images."""

    def draw(self, visualize):
        from tnt_jax.evaluation.evaluate import features_of

        if len(self.images) > 1:
            raise InputError(f"tsne shows the feature maps of one image, and {len(self.images)} were given")
        model = self.load()
        if self.images:
            return visualize.map_tsne(model, self.images[0])
        data, split = self.test_split(model)
        features, labels = features_of(model, split, data)
        return visualize.image_tsne(features, labels, split.class_names)


@dataclasses.dataclass(frozen=True)
class Confusion(OfModel):
    """Shows how many test images of each class are taken for which."""

    table: str | None = None
    """Also write the numbers to this file: .csv."""

    def draw(self, visualize):
        from tnt_jax.commands.tables import write_rows
        from tnt_jax.evaluation.evaluate import predictions_of
        from tnt_jax.storage.description import description_of
        from tnt_jax.storage.files import check_ending
        from tnt_jax.tasks.table import TASKS

        if self.table:
            check_ending(self.table, (".csv",), "a table of a confusion matrix")
        model = self.load()
        task = description_of(model).outputs.task
        if self.table and not TASKS[task].has_probabilities:
            raise InputError(f"--table was given, and a {task} has no confusion matrix")
        data, split = self.test_split(model)
        (predictions,) = predictions_of([model], split, data)
        if self.table:
            counts, _, rows, columns, *_ = predictions.confusion(split.class_names)
            named = [
                {"right class": row} | dict(zip(columns, each.tolist(), strict=True))
                for row, each in zip(rows, counts, strict=True)
            ]
            write_rows(self.table, named)
        return visualize.confusion(predictions, split.class_names, data=f"{data.source}, {split.name}")


@dataclasses.dataclass(frozen=True)
class WorstPredictions(OfModel):
    """Shows the test images on which a model is wrong and most sure."""

    count: int = 24
    """Images to show."""

    def draw(self, visualize):
        from tnt_jax.evaluation.evaluate import predictions_of

        if self.count < 1:
            raise InputError(f"--count is {self.count}, and must be at least 1")
        model = self.load()
        data, split = self.test_split(model)
        (predictions,) = predictions_of([model], split, data)
        return visualize.mistakes(predictions, split, count=self.count, data=f"{data.source}, {split.name}")


@dataclasses.dataclass(frozen=True)
class Curves:
    """Shows loss, metric and learning rate of a run, or of several together."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The folder of a run."""
    others: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")] = ()
    """Folders of further runs."""
    out: str | None = None
    """File to write: .png, .pdf, .svg, .jpg or .webp; by default curves.png."""

    @property
    def subject(self) -> str:
        return ", ".join((self.run, *self.others))

    def draw(self, visualize):
        from tnt_jax.visualize.runs import compare_curves, curves

        return compare_curves((self.run, *self.others)) if self.others else curves(self.run)


@dataclasses.dataclass(frozen=True)
class OfConfiguration:
    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG_OR_RUN")] = "digits"
    """A configuration by its name, a file like those in configs/, or the folder of a run."""
    out: str | None = None
    """File to write: .png, .pdf, .svg, .jpg or .webp; by default PICTURE.png."""

    @property
    def subject(self) -> str:
        return self.config


@dataclasses.dataclass(frozen=True)
class Schedule(OfConfiguration):
    """Shows the learning rate of a run. Other flags are those of train.py."""

    def draw(self, visualize, config: TrainConfig[ModelChanges]):
        return visualize.schedule(config)


@dataclasses.dataclass(frozen=True)
class Batch(OfConfiguration):
    """Shows a batch that a run trains on. Other flags are those of train.py."""

    step: int = 0
    """The one after this step."""
    count: int = 16
    """Images of it to show."""

    def draw(self, visualize, config: TrainConfig[ModelChanges]):
        if self.step < 0 or self.count < 1:
            raise InputError(f"--step is {self.step} and --count {self.count}; they start at 0 and at 1")
        return visualize.batch(config, step=self.step, count=self.count)


PICTURES = {
    "why": Why,
    "inner-attention": InnerAttention,
    "outer-attention": OuterAttention,
    "class-attention": ClassAttention,
    "words": Words,
    "features": Features,
    "tsne": Tsne,
    "confusion": Confusion,
    "mistakes": WorstPredictions,
    "curves": Curves,
    "schedule": Schedule,
    "batch": Batch,
}


@command
def main() -> None:
    name, configuration = "".join(sys.argv[1:2]), ()
    if issubclass(PICTURES.get(name, object), OfConfiguration):  # which the flags of train.py change
        picture, *configuration = parse_with_config(PICTURES[name], sys.argv[2:])
    else:
        picture = tyro.extras.subcommand_cli_from_dict(PICTURES, description="Draws a picture.")
    from tnt_jax import visualize
    from tnt_jax.visualize.canvas import check_out

    out = picture.out or f"{name}.png"
    check_out(out)
    picture.draw(visualize, *configuration).savefig(out)
    print(f"{out} shows {name} of {picture.subject}")
