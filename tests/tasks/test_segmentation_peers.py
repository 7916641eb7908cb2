"""The losses of segmentation beside those of PyTorch and transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from others import transformers  # noqa: F401, before what is in it

from tnt_jax.tasks.losses import Objective, cross_entropy_dice, pixel_cross_entropy
from tnt_jax.tasks.segmentation import IGNORED, Segmentation
from tnt_jax.tasks.task import Outputs

CLASSES = 5
WEIGHTS = np.array([0.2, 1, 3, 0.7, 1.4])


def case():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (3, 6, 7, CLASSES)).astype(np.float32)
    labels = rng.integers(0, CLASSES, (3, 6, 7)).astype(np.uint16)
    labels[0, :3], labels[1] = IGNORED, labels[1].clip(1, 2)
    return logits, labels


def of_torch(logits, labels, weights):
    weight = None if weights is None else torch.tensor(weights, dtype=torch.float32)
    return torch.nn.functional.cross_entropy(
        logits.permute(0, 3, 1, 2), torch.tensor(labels.astype(np.int64)), weight, ignore_index=IGNORED
    )


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_cross_entropy_of_each_image_and_its_gradient_are_pytorchs(weights):
    logits, labels = case()
    objective = Objective(Segmentation(), Outputs(), "pixel_cross_entropy", class_weights=weights)
    found = pixel_cross_entropy(objective, jnp.asarray(logits), jnp.asarray(labels))
    given = torch.tensor(logits, requires_grad=True)
    wanted = [of_torch(given[image : image + 1], labels[image : image + 1], weights) for image in range(3)]
    np.testing.assert_allclose(found, [each.item() for each in wanted], rtol=1e-5)
    sum(wanted).backward()
    ours = jax.grad(lambda x: 3 * objective.loss(x, jnp.asarray(labels)))(jnp.asarray(logits))
    np.testing.assert_allclose(ours, given.grad, atol=1e-6)


def test_dice_of_each_class_is_that_of_maskformer():
    """transformers has it of one class from a logit: here of the softmax's probability, over pixels with a class."""
    from transformers.loss.loss_for_object_detection import dice_loss

    logits, labels = case()
    objective = Objective(Segmentation(), Outputs())
    both, alone = (
        function(objective, jnp.asarray(logits), jnp.asarray(labels))
        for function in (cross_entropy_dice, pixel_cross_entropy)
    )
    p = torch.softmax(torch.tensor(logits, dtype=torch.float64), -1).numpy()
    for image in range(3):
        seen = labels[image] != IGNORED
        of_classes = []
        for label in np.unique(labels[image][seen]):
            own = torch.logit(torch.tensor(p[image][seen][:, label]))[None]
            target = torch.tensor((labels[image][seen] == label).astype(float))[None]
            of_classes.append(dice_loss(own, target, num_boxes=1).item())
        assert float(both[image] - alone[image]) == pytest.approx(np.mean(of_classes), rel=1e-5)
