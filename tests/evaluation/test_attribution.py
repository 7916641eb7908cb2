"""Why this class: the methods beside the same ones in PyTorch on timm's network, and where the reason is known."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from commands import ROOT
from others import timm
from small_models import small_model, small_pyramid
from small_runs import tiny_run

import tnt_jax
from benchmarks.marks import MARKS, SIDE, marked_images, write_idx
from tnt_jax.config import DataConfig, InputError, ModelChanges, OptimizerConfig
from tnt_jax.data.mixing import normalise
from tnt_jax.evaluation.attribution import METHODS, OF_ATTENTION, attribute, input_gradient
from tnt_jax.evaluation.faithfulness import area_under, deletion_and_insertion
from tnt_jax.models.variants import with_formulation
from tnt_jax.storage.description import description_of
from tnt_jax.storage.torch.write import export
from tnt_jax.training.loop import train

SIZES = {"patch_size": 16, "depth": 3, "num_classes": 5}
CLASSES = np.array([1, 4])


def images_of(model):
    shape = (2, *model.config.image_size, model.config.in_channels)
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


class Theirs:
    """timm's network in float64 with the parameters of ours, and what its modules return."""

    def __init__(self, model, folder):
        export(model, folder / "model.pth", "timm")
        self.model = timm.models.tnt.TNT(
            img_size=32, inner_dim=4, embed_dim=12, depth=3, num_heads_inner=2, num_heads_outer=3, num_classes=5
        )
        self.model.load_state_dict(torch.load(folder / "model.pth"))
        self.model.double().eval()
        self.returned = {}
        for name, module in self.model.named_modules():
            if name.endswith(("attn_out.attn_drop", "attn_in.attn_drop", "norm1_proj")) or name.count(".") == 1:
                module.register_forward_hook(lambda _, given, returned, name=name: self._note(name, given, returned))
        self.images = torch.tensor(images_of(model).transpose(0, 3, 1, 2), dtype=torch.float64, requires_grad=True)
        logits = self.model(self.images)
        logits[range(2), CLASSES].sum().backward(retain_graph=True)

    def _note(self, name, given, returned):
        values = {"words": given[0]} if name.endswith("norm1_proj") else {"": returned}
        if isinstance(returned, tuple):
            values = {"words": returned[0], "sentences": returned[1]}
        for kind, value in values.items():
            if value.requires_grad:
                value.retain_grad()
            self.returned[name, kind] = value

    def attention(self, block, which="out"):
        """The weights (images, ..., heads, queries, keys) and their gradient."""
        weights = self.returned[f"blocks.{block}.attn_{which}.attn_drop", ""]
        return weights.detach(), weights.grad


@pytest.fixture(scope="module")
def ours():
    return small_model(**SIZES)


@pytest.fixture(scope="module")
def theirs(ours, tmp_path_factory):
    return Theirs(ours, tmp_path_factory.mktemp("timm"))


def close(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("inner", ["reference", "native", "feature_major"])
def test_the_gradient_by_the_input_is_that_of_timm(inner, ours, theirs):
    model = with_formulation(ours, inner)
    close(input_gradient(model, images_of(model), CLASSES), theirs.images.grad.numpy().transpose(0, 2, 3, 1))


ON_TWO_DEVICES = """
import sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import tnt_jax
from tnt_jax.evaluation.attribution import input_gradient
mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
model = tnt_jax.load_model(sys.argv[1])
images = jax.device_put(np.load(sys.argv[2]), NamedSharding(mesh, PartitionSpec("data")))
assert len(images.addressable_shards) == 2
with jax.set_mesh(mesh):
    np.save(sys.argv[2], input_gradient(model, images, np.array(sys.argv[3:], int)))
"""


@pytest.mark.slow
def test_the_gradient_by_the_input_is_that_of_timm_on_two_devices(ours, theirs, tmp_path):
    tnt_jax.save_model(ours, tmp_path / "model")
    np.save(tmp_path / "images.npy", images_of(ours))
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-c", ON_TWO_DEVICES, tmp_path / "model", tmp_path / "images.npy", *map(str, CLASSES)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    close(np.load(tmp_path / "images.npy"), theirs.images.grad.numpy().transpose(0, 2, 3, 1))


def rolled(theirs, which="out"):
    """Chefer's rollout with the whole matrix R."""
    flow = None
    for block in range(3):
        weights, gradient = theirs.attention(block, which)
        step = (weights * gradient).clamp(min=0).mean(dim=1)
        flow = torch.eye(step.shape[-1], dtype=step.dtype) if flow is None else flow
        flow = flow + step @ flow
        yield flow


def test_rollout_of_sentences_is_chefers(ours, theirs):
    *_, flow = rolled(theirs)
    close(attribute(ours, images_of(ours), CLASSES, "rollout", size="sentences").reshape(2, 4), flow[:, 0, 1:].numpy())


def test_grad_cam_is_that_of_pytorch(ours, theirs):
    for block, default in ((0, {"block": 0}), (1, {})):
        value = theirs.returned[f"blocks.{block}", "sentences"]
        maps = (value.grad[:, 1:].mean(dim=1, keepdim=True) * value.detach()[:, 1:]).sum(-1).clamp(min=0)
        found = attribute(ours, images_of(ours), CLASSES, "grad-cam", size="sentences", **default)
        close(found.reshape(2, 4), maps.numpy())
    words = theirs.returned["blocks.1", "words"]
    value, gradient = (each.reshape(2, 4, 16, 4) for each in (words.detach(), words.grad))
    maps = (gradient.mean(dim=(1, 2), keepdim=True) * value).sum(-1).clamp(min=0).reshape(2, 2, 2, 4, 4)
    found = attribute(ours, images_of(ours), CLASSES, "grad-cam", size="words", block=1)
    close(found, maps.permute(0, 1, 3, 2, 4).reshape(2, 8, 8).numpy())


@pytest.mark.parametrize(
    ("method", "make"),
    [("rollout", small_model), ("rollout", small_pyramid), ("integrated-gradients", small_model)],
)
def test_words_of_a_patch_add_up_to_it(method, make):
    model = make(image_size=64)
    maps = {size: attribute(model, images_of(model), [0, 2], method, size=size) for size in OF_ATTENTION}
    rows, columns = maps["sentences"].shape[1:]
    assert maps["words"].shape == (2, 4 * rows, 4 * columns)
    close(maps["words"].reshape(2, rows, 4, columns, 4).sum(axis=(2, 4)), maps["sentences"])


def test_integrated_gradients_add_up_to_the_difference_of_the_logits():
    model = tnt_jax.create_model("tnt_ti_patch16_224", image_size=32, depth=2, num_classes=5)
    images = images_of(model)
    logits, at_mean = (np.asarray(model(each))[range(2), CLASSES] for each in (images, 0 * images))
    maps = attribute(model, images, CLASSES, "integrated-gradients", size="pixels")
    np.testing.assert_allclose(maps.sum(axis=(1, 2)), logits - at_mean, atol=1e-5)


@pytest.fixture(scope="module")
def marked(tmp_path_factory):
    """A model that tells marks of 4 x 4 pixels, images that have one, their classes and where the marks are."""
    folder = tmp_path_factory.mktemp("marks")
    write_idx(folder, marked_images(3000, 0)[:2], marked_images(500, 1)[:2])
    sizes = {"in_channels": 1, "image_size": 32, "patch_size": 8, "word_stride": 2, "depth": 2, "drop_path_rate": 0.0}
    sizes |= {"inner_dim": 12, "inner_heads": 2, "outer_dim": 48, "outer_heads": 3}
    config = tiny_run(
        folder / "run",
        model=ModelChanges("tnt_ti_patch16_224", **sizes),
        data=DataConfig.plain(f"idx:{folder}"),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_epochs=1, ema_decay=0.99),
        batch_size=64,
        epochs=12,
        eval_every_epochs=12,
    )
    assert train(config)["ema_top1"] > 0.99
    images, classes, corners = marked_images(128, 2)
    has_mark = classes < len(MARKS)
    model = tnt_jax.load_model(folder / "run")
    inputs = normalise(images[has_mark][..., None], description_of(model).preprocessing)
    return model, inputs, classes[has_mark], corners[has_mark]


def hits(maps, corners, margin=0):
    """The share of maps whose highest place overlaps the mark, or a frame of so many pixels around it."""
    side = SIDE // maps.shape[1]
    rows, columns = (side * each for each in np.divmod(maps.reshape(len(maps), -1).argmax(axis=1), maps.shape[2]))
    first, last = corners.T - margin, corners.T + 4 + margin
    inside = [(at + side > low) & (at < high) for at, low, high in zip((rows, columns), first, last, strict=True)]
    return np.logical_and(*inside).mean()


@pytest.mark.nightly
def test_the_highest_place_is_where_the_reason_lies(marked):
    model, inputs, classes, corners = marked
    maps = {
        (method, size): attribute(model, inputs, classes, method, size=size)
        for method, size in itertools.product(("rollout", "integrated-gradients"), ("sentences", "words"))
    }
    assert hits(maps["rollout", "sentences"], corners) > 0.95
    assert hits(maps["rollout", "words"], corners, margin=3) > 0.85  # a word sees the 3 pixels around it, too
    assert hits(maps["integrated-gradients", "sentences"], corners) > 0.95
    assert hits(maps["integrated-gradients", "words"], corners) > 0.95


@pytest.mark.nightly
def test_a_map_is_of_what_was_learned(marked):
    """Random weights destroy it (Adebayo et al., arXiv 1810.03292)."""
    model, inputs, classes, corners = marked
    untrained = tnt_jax.models.variants.build_model(model.config, seed=1)
    for method in METHODS:
        learned, random = (attribute(each, inputs, classes, method, size="sentences") for each in (model, untrained))
        ranks = [np.argsort(np.argsort(maps.reshape(len(maps), -1), axis=1), axis=1) for maps in (learned, random)]
        rank_correlation = [np.corrcoef(*pair)[0, 1] for pair in zip(*ranks, strict=True)]
        assert np.mean(rank_correlation) < 0.5, method
    assert hits(attribute(untrained, inputs, classes, "rollout", size="sentences"), corners) < 0.5


@pytest.mark.nightly
def test_deletion_and_insertion_tell_good_maps_from_random_ones(marked):
    model, inputs, classes, _ = marked
    good = attribute(model, inputs, classes, "integrated-gradients", size="words")
    random = np.random.default_rng(0).random(good.shape).astype(np.float32)
    areas = [
        [float(area_under(each).mean()) for each in deletion_and_insertion(model, inputs, classes, maps)]
        for maps in (good, random, -good)
    ]
    deletions, insertions = zip(*areas, strict=True)
    assert deletions[0] < 0.1 < deletions[1] < deletions[2]
    assert insertions[0] > 0.8 > insertions[1] > insertions[2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "cam"}, "there is no method 'cam'; there are rollout, grad-cam"),
        ({"method": "rollout", "size": "pixels"}, "rollout has no map of pixels; it has sentences and words"),
        ({"method": "rollout", "block": 1}, "rollout has no option 'block'; it has none"),
        ({"method": "grad-cam", "block": 2, "size": "sentences"}, "block 2 has no patches that reach the class"),
        ({"method": "grad-cam", "block": 1}, "block 1 has no inner transformer; the blocks that do are 0"),
        ({"method": "integrated-gradients", "steps": 0}, "steps is 0, and must be at least 1"),
        ({"classes": [1, 5]}, "there is no class 5; the model has 5 classes, counted from 0"),
    ],
)
def test_what_cannot_be_explained_is_said(given, message):
    model = small_model(**SIZES, inner_blocks=(0,))
    with pytest.raises(InputError, match=message):
        attribute(model, images_of(model), **{"classes": [0, 1], **given})
