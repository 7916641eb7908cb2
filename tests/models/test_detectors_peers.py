"""Detectors beside torchvision's RetinaNet and transformers' DETR: outputs, losses, gradients of the same weights."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from others import transformers  # first: it makes torchvision importable
from torchvision.models.detection import RetinaNet as TheirRetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou, generalized_box_iou

from tnt_jax.models import detectors
from tnt_jax.models.detectors import LAYERS, Detr, RetinaNet, anchors_of
from tnt_jax.models.variants import model_config
from tnt_jax.tasks.boxes import giou, iou
from tnt_jax.tasks.detection_losses import anchor_losses, set_losses

SIDE, CLASSES = 128, 5
SMALL = {
    "image_size": SIDE, "num_classes": CLASSES, "depth": 4, "inner_dim": 8, "inner_heads": 2, "outer_dim": 64,
    "outer_heads": 2,
}  # fmt: skip
CONFIG = model_config("tnt_ti_patch16_224", **SMALL, head="retinanet")


def some_targets(rng, counts, rows=6):
    """Boxes in pixels and classes of each image, and the same as labels."""
    labels, theirs = np.full((len(counts), 1 + rows, 7), -1, np.float32), []
    for label, count in zip(labels, counts, strict=True):
        corner = rng.uniform(0, 0.6, (count, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(0.1, 0.39, (count, 2))], 1).astype(np.float32)
        classes = rng.integers(0, CLASSES, count)
        label[1 : 1 + count] = np.concatenate([boxes, classes[:, None], np.zeros((count, 1)), np.ones((count, 1))], 1)
        theirs.append((torch.from_numpy(boxes), torch.from_numpy(classes)))
    return labels, theirs


def fill(variable, tensor):
    """Takes numbers of PyTorch's, with the axes where Flax has them."""
    numbers = tensor.detach().numpy()
    numbers = numbers.transpose(2, 3, 1, 0) if numbers.ndim == 4 else numbers
    assert variable.get_value().shape == numbers.shape
    variable.set_value(jnp.asarray(numbers))


def test_overlaps_are_torchvisions():
    rng = np.random.default_rng(0)
    one, other = (rng.uniform(0, 0.5, (7, 2)) for _ in range(2))
    boxes = [np.concatenate([low, low + rng.uniform(0.01, 0.5, (7, 2))], 1).astype(np.float32) for low in (one, other)]
    for ours, theirs in ((iou, box_iou), (giou, generalized_box_iou)):
        expected = theirs(*map(torch.from_numpy, boxes)).numpy()
        for array in (np.asarray, jnp.asarray):
            found = ours(array(boxes[0])[:, None], array(boxes[1])[None])
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


class Maps(torch.nn.Module):
    """A backbone that gives the maps that it was told."""

    out_channels = 64
    maps = ()

    def forward(self, images):
        return {str(index): each for index, each in enumerate(self.maps)}


@pytest.fixture(scope="module")
def retinanets():
    """Ours, and torchvision's with the weights of ours that lie behind the feature pyramid."""
    ours = RetinaNet((64,) * 4, config=CONFIG, rngs=nnx.Rngs(0))
    sizes = tuple(tuple(int(side * 2 ** (third / 3)) for third in range(3)) for side in (32, 64, 128, 256, 512))
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
    theirs = TheirRetinaNet(Maps(), CLASSES, anchor_generator=anchors, min_size=SIDE, max_size=SIDE).eval()
    towers = (
        (ours.classes, theirs.head.classification_head.conv, theirs.head.classification_head.cls_logits),
        (ours.boxes, theirs.head.regression_head.conv, theirs.head.regression_head.bbox_reg),
    )
    for tower, convs, last in towers:
        # The first weights, a hundredth, would hide an error behind the bias.
        for their in [*(each[0] for each in convs), last]:
            torch.nn.init.normal_(their.weight, std=0.1)
        pairs = zip([*tower.convs, tower.last], [*(each[0] for each in convs), last], strict=True)
        for mine, their in pairs:
            fill(mine.kernel, their.weight)
            fill(mine.bias, their.bias)
    return ours, theirs


def random_levels(rng):
    return [rng.standard_normal((2, side, side, 64)).astype(np.float32) for side in (16, 8, 4, 2, 1)]


def of_torchvision(theirs, levels):
    images = ImageList(torch.zeros(2, 3, SIDE, SIDE), [(SIDE, SIDE)] * 2)
    maps = [torch.from_numpy(each).permute(0, 3, 1, 2) for each in levels]
    return theirs.head(maps), theirs.anchor_generator(images, maps)


def test_retinanets_head_and_anchors_are_torchvisions(retinanets):
    ours, theirs = retinanets
    levels = random_levels(np.random.default_rng(1))
    found = ours.over_levels(list(map(jnp.asarray, levels)))
    expected, anchors = of_torchvision(theirs, levels)
    for mine, name in ((found[..., :CLASSES], "cls_logits"), (found[..., CLASSES:-4], "bbox_regression")):
        largest = float(expected[name].abs().max())
        np.testing.assert_allclose(mine / largest, expected[name].detach() / largest, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found[0, :, -4:] * SIDE, anchors[0], rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (0, 0), (6, 5)])
@pytest.mark.parametrize("by", ["l1", "giou"])
def test_retinanets_losses_and_gradients_are_torchvisions(counts, by, retinanets):
    _, theirs = retinanets
    rng = np.random.default_rng(sum(counts))
    levels = random_levels(rng)
    labels, given = some_targets(rng, counts)
    expected, anchors = of_torchvision(theirs, levels)
    outputs = {name: tensor.detach().requires_grad_() for name, tensor in expected.items()}
    targets = [{"boxes": boxes * SIDE, "labels": classes} for boxes, classes in given]
    theirs.head.regression_head._loss_type = by
    losses = theirs.compute_loss(targets, outputs, anchors)
    sum(losses.values()).backward()

    def loss(logits):
        each = anchor_losses(logits, labels, by_giou=by == "giou")
        return sum(of.mean() for of in each), each

    of_both = [outputs[name].detach().numpy() for name in ("cls_logits", "bbox_regression")]
    found = np.concatenate([*of_both, np.stack(anchors) / SIDE], -1)
    gradient, each = jax.jit(jax.grad(loss, has_aux=True))(found)
    for mine, name in zip(each, ("classification", "bbox_regression"), strict=True):
        np.testing.assert_allclose(mine.mean(), losses[name].item(), rtol=1e-5, atol=1e-6)
    theirs = [outputs[name].grad.numpy() for name in ("cls_logits", "bbox_regression")]
    np.testing.assert_allclose(gradient[..., :CLASSES], theirs[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gradient[..., CLASSES:-4], theirs[1], rtol=1e-4, atol=1e-6)


def test_anchors_fit_images_of_any_shape():
    found = anchors_of([(6, 4), (3, 2)], (48, 32)) * [32, 48, 32, 48]
    theirs = AnchorGenerator(((32, 40, 50), (64, 80, 101)), ((0.5, 1.0, 2.0),) * 2)
    maps = [torch.zeros(1, 1, 6, 4), torch.zeros(1, 1, 3, 2)]
    (expected,) = theirs(ImageList(torch.zeros(1, 3, 48, 32), [(48, 32)]), maps)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_detr_begins_as_its_authors_do():
    """`xavier_uniform_` of every matrix of the transformers, PyTorch's own of the linear maps around them."""
    ours, xavier = Detr((64,) * 4, config=dataclasses.replace(CONFIG, head="detr"), rngs=nnx.Rngs(0)), []
    for shape in ((64, 64), (512, 64), (64, 512)):
        xavier.append(torch.nn.init.xavier_uniform_(torch.empty(shape)))
    attention, linear = torch.nn.MultiheadAttention(64, 2), torch.nn.Linear(64, 64)
    for layer in (ours.encoder[0], ours.decoder[5]):
        within = [(each, attention.in_proj_weight) for each in (layer.attn.q, layer.attn.k, layer.attn.v)]
        within += zip((layer.attn.proj, layer.fc1, layer.fc2), xavier, strict=True)
        within += [(ours.projection, linear.weight), (ours.boxes[2], linear.weight), (ours.classes, linear.weight)]
        for found, theirs in within:
            kernel, bound = found.kernel[...], float(theirs.detach().abs().max())
            assert float(abs(kernel).max()) == pytest.approx(bound, rel=0.03)
            assert float(kernel.std()) == pytest.approx(bound / 3**0.5, rel=0.1)


@pytest.fixture(scope="module")
def detrs():
    """Ours, and transformers' with the same weights; with 20 queries fewer numbers are at an edge."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detectors, "QUERIES", 20)
        ours = Detr((64,) * 4, config=dataclasses.replace(CONFIG, head="detr"), rngs=nnx.Rngs(0))
    given = {"backbone": "tnt_s_patch16_224", "out_indices": [11], "use_pretrained_backbone": False}
    backbone = transformers.TimmBackboneConfig(**given)
    config = transformers.DetrConfig(
        backbone_config=backbone, num_labels=CLASSES, d_model=64, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=512, decoder_ffn_dim=512, num_queries=20,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.DetrForObjectDetection(config).eval()
    theirs.model.backbone = torch.nn.Identity()  # ours is compared elsewhere
    theirs.model.input_projection = torch.nn.Conv2d(64, 64, 1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.ndim == 2:  # as initialised, all queries say nearly the same, and rounding would match them
                parameter.mul_(2)
        theirs.model.query_position_embeddings.weight.normal_(std=2)
    for name, tensor in theirs.state_dict().items():
        fill(*ours_of(ours, name, tensor))
    return ours, theirs


NAMES = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "proj"}


def ours_of(ours, name, tensor):
    """Our parameter of a tensor of transformers'."""
    keys = name.split(".")
    if name == "model.query_position_embeddings.weight":
        return ours.queries, tensor
    kind = "bias" if keys[-1] == "bias" else "kernel"
    if name.startswith("model.input_projection"):
        return getattr(ours.projection, kind), tensor[..., 0, 0].T if kind == "kernel" else tensor
    if name.startswith("class_labels_classifier"):
        return getattr(ours.classes, kind), tensor.T
    if name.startswith("bbox_predictor"):
        return getattr(ours.boxes[int(keys[2])], kind), tensor.T
    if "norm" in name:
        kind = "bias" if keys[-1] == "bias" else "scale"
        if keys[1:3] == ["decoder", "layernorm"]:
            return getattr(ours.norm, kind), tensor
        norm = {"self_attn_layer_norm": "norm1", "encoder_attn_layer_norm": "norm2", "final_layer_norm": "norm3"}
        return getattr(getattr(getattr(ours, keys[1])[int(keys[3])], norm[keys[4]]), kind), tensor
    layer = getattr(ours, keys[1])[int(keys[3])]
    if keys[4] == "mlp":
        return getattr(getattr(layer, keys[5]), kind), tensor.T
    part = getattr(layer, {"self_attn": "attn", "encoder_attn": "cross"}[keys[4]])
    return getattr(getattr(part, NAMES[keys[5]]), kind), tensor.T


def of_transformers(theirs, maps, labels):
    """What the transformers make of maps; the layers of the decoder one by one."""
    model, maps = theirs.model, torch.from_numpy(maps).permute(0, 3, 1, 2)
    features = model.input_projection(maps).flatten(2).transpose(1, 2)
    places = model.position_embedding(shape=maps.shape, device="cpu", dtype=torch.float32, mask=None)
    places = places.flatten(2).transpose(1, 2).expand(len(maps), -1, -1)
    memory = model.encoder(inputs_embeds=features, spatial_position_embeddings=places).last_hidden_state
    queries = model.query_position_embeddings.weight.unsqueeze(0).repeat(len(maps), 1, 1)
    # With auxiliary_loss transformers 5.24 goes on with what is normalised for the loss, as DETR's authors do not.
    found = []
    hooks = [layer.register_forward_hook(lambda *of: found.append(of[-1])) for layer in model.decoder.layers]
    model.decoder(
        inputs_embeds=torch.zeros_like(queries),
        spatial_position_embeddings=places,
        object_queries_position_embeddings=queries,
        encoder_hidden_states=memory,
    )
    for hook in hooks:
        hook.remove()
    theirs.config.auxiliary_loss, found = True, model.decoder.layernorm(torch.stack(found))
    logits, boxes = theirs.class_labels_classifier(found), theirs.bbox_predictor(found).sigmoid()
    targets = [{"boxes": boxes, "class_labels": classes} for boxes, classes in labels]
    loss, each, _ = theirs.loss_function(logits[-1], targets, "cpu", boxes[-1], theirs.config, logits, boxes)
    theirs.config.auxiliary_loss = False
    return torch.cat([logits, boxes], -1).transpose(0, 1), loss, each


def distance(gradient, expected):
    """The largest difference, as a share of the largest number."""
    return float(abs(gradient - expected).max() / max(1e-3, abs(expected).max()))


def nearby_gradients(theirs, maps, labels):
    """Gradients of weights and maps that differ by little more than rounding, which is the processor's: it may match
    another query to a box, or bring what enters a ReLU to the other side of 0."""
    for seed in range(5):
        torch.manual_seed(seed)
        near = copy.deepcopy(theirs)
        with torch.no_grad():
            for parameter in near.parameters():
                parameter.mul_(1 + 3e-7 * torch.randn_like(parameter))
        near.zero_grad()
        aside = 1e-5 * torch.randn(maps.shape).numpy()
        of_transformers(near, maps + aside, labels)[1].backward()
        yield [parameter.grad for parameter in near.parameters() if parameter.grad is not None]


@nnx.jit
@functools.partial(nnx.value_and_grad, has_aux=True)
def loss_and_gradients(model, maps, labels):
    logits = model.of_map(maps, jax.random.key(0))
    of_classes, l1, of_hull = set_losses(logits, labels)
    return (of_classes + 5 * l1 + 2 * of_hull).sum(), (logits, of_classes, l1, of_hull)


@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (6, 12)])
def test_detr_its_losses_and_gradients_are_transformers(counts, detrs):
    ours, theirs = detrs
    rng = np.random.default_rng(sum(counts))
    labels, given = some_targets(rng, counts, rows=12)
    centred = [
        (torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1), classes)
        for boxes, classes in given
    ]
    steady = False
    while not steady:
        maps = rng.standard_normal((2, 5, 3, 64)).astype(np.float32)
        first, *others = nearby_gradients(theirs, maps, centred)
        steady = all(distance(*each) <= 1e-4 for other in others for each in zip(first, other, strict=True))
    theirs.zero_grad()
    expected, total, each = of_transformers(theirs, maps, centred)
    total.backward()

    (found, (logits, *losses)), gradients = loss_and_gradients(ours, maps, labels)
    np.testing.assert_allclose(logits, expected.detach(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found, total.item(), rtol=1e-5)
    for index in range(LAYERS):
        end = "" if index == LAYERS - 1 else f"_{index}"
        for mine, name in zip(losses, ("loss_ce", "loss_bbox", "loss_giou"), strict=True):
            np.testing.assert_allclose(mine[index], each[name + end].item(), rtol=1e-5, atol=1e-6)
    for name, parameter in theirs.named_parameters():
        mine, gradient = ours_of(gradients, name, parameter.grad.numpy())
        assert distance(mine.get_value(), gradient) <= 1e-4, name


def test_the_last_layer_alone_is_said_without_a_key(detrs):
    ours, _ = detrs
    maps = jnp.ones((1, 2, 2, 64))
    last = ours.of_map(maps, jax.random.key(0))[:, -1]
    np.testing.assert_allclose(ours.of_map(maps)[:, 0], last, rtol=1e-5, atol=1e-6)


def test_dropout_is_in_training_and_where_it_is_asked_for_alone():
    dropped, without = (
        Detr((64,) * 4, config=dataclasses.replace(CONFIG, head="detr", drop_rate=0.5, **rate), rngs=nnx.Rngs(0))
        for rate in ({"head_drop_rate": 0.1}, {})
    )
    maps = jnp.ones((1, 2, 2, 64))
    np.testing.assert_array_equal(dropped.of_map(maps), without.of_map(maps))
    of_seeds = [dropped.of_map(maps, jax.random.key(seed)) for seed in (0, 1)]
    assert np.abs(of_seeds[0] - of_seeds[1]).max(axis=(0, 2, 3)).min() > 0.01
    np.testing.assert_array_equal(*(without.of_map(maps, jax.random.key(seed)) for seed in (0, 1)))
