"""Heads for every pixel beside those of others, with the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from others import transformers
from small_models import small_model

from tnt_jax.models.heads import MlpDecoder, resized
from tnt_jax.models.layers import Linear
from tnt_jax.models.variants import model_config

DIMS, DIM, CLASSES, SIZES = (8, 16, 24, 32), 20, 5, ((16, 24), (8, 12), (4, 6), (2, 3))


def set_from(module, kernel, bias=None):
    module.kernel.set_value(jnp.asarray(kernel.detach().numpy()))
    if bias is not None:
        module.bias.set_value(jnp.asarray(bias.detach().numpy()))


@pytest.mark.parametrize("training", [False, True])
def test_the_mlp_decoder_is_segformers_decode_head(training):
    """The running averages of its batch norm too."""
    torch.manual_seed(0)
    from transformers.models.segformer.modeling_segformer import SegformerDecodeHead

    sizes = {"hidden_sizes": DIMS, "decoder_hidden_size": DIM, "num_labels": CLASSES, "classifier_dropout_prob": 0.0}
    theirs = SegformerDecodeHead(transformers.SegformerConfig(**sizes)).train(training)
    for parameter in (*theirs.parameters(), theirs.batch_norm.running_mean, theirs.batch_norm.running_var):
        torch.nn.init.uniform_(parameter, 0.5, 1.5) if parameter.ndim == 1 else torch.nn.init.normal_(parameter)
    config = model_config("tnt_ti_patch16_224")
    ours = MlpDecoder(DIMS, DIM, config=config, rngs=nnx.Rngs(0))
    classes = Linear(DIM, CLASSES, config=config, rngs=nnx.Rngs(0))
    projections = [each for each in theirs.modules() if type(each).__name__ == "SegformerMLP"]
    for linear, other in zip(ours.linears, projections, strict=True):
        set_from(linear, other.proj.weight.T, other.proj.bias)
    set_from(ours.fuse, theirs.linear_fuse.weight[:, :, 0, 0].T)
    set_from(classes, theirs.classifier.weight[:, :, 0, 0].T, theirs.classifier.bias)
    norm = theirs.batch_norm
    pairs = {"scale": norm.weight, "bias": norm.bias, "mean": norm.running_mean, "var": norm.running_var}
    for name, value in pairs.items():
        getattr(ours.norm, name).set_value(jnp.asarray(value.detach().numpy().copy()))
    rng = np.random.default_rng(0)
    maps = [rng.normal(size=(2, dim, *size)).astype(np.float32) for dim, size in zip(DIMS, SIZES, strict=True)]
    with torch.no_grad():
        wanted = theirs([torch.tensor(each) for each in maps]).numpy()
    key = jax.random.key(0) if training else None
    found = classes(ours([jnp.asarray(each.transpose(0, 2, 3, 1)) for each in maps], key))
    np.testing.assert_allclose(found.transpose(0, 3, 1, 2), wanted, rtol=1e-5, atol=1e-5 * abs(wanted).max())
    np.testing.assert_allclose(ours.norm.var[...], norm.running_var, rtol=1e-5)


def test_the_linear_head_is_segmenters():
    """Linear map of the patches after the last norm, classes first, bilinear to the size of the image."""
    model = small_model(head="linear", num_classes=CLASSES, image_size=(32, 48))
    images = np.random.default_rng(0).normal(size=(2, 32, 48, 3)).astype(np.float32)
    tokens = torch.tensor(np.asarray(model.forward_features(images)))[:, 1:]
    head = torch.nn.Linear(tokens.shape[2], CLASSES)
    head.weight.data = torch.tensor(np.asarray(model.head.kernel[...])).T
    head.bias.data = torch.tensor(np.asarray(model.head.bias[...]))
    masks = head(tokens).permute(0, 2, 1).reshape(2, CLASSES, 2, 3)
    wanted = torch.nn.functional.interpolate(masks, size=(32, 48), mode="bilinear").detach().numpy()
    found = np.asarray(model(images)).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * abs(wanted).max())


@pytest.mark.parametrize("size", [(9, 14), (31, 7), (4, 6)])
def test_maps_are_enlarged_as_by_pytorch(size):
    maps = np.random.default_rng(0).normal(size=(1, 4, 6, 3)).astype(np.float32)
    wanted = torch.nn.functional.interpolate(torch.tensor(maps).permute(0, 3, 1, 2), size=size, mode="bilinear")
    np.testing.assert_allclose(resized(jnp.asarray(maps), size), wanted.permute(0, 2, 3, 1), atol=1e-5)
