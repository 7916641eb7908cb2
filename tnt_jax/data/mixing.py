"""What happens to a batch on the device, inside jit: uint8 to normalised floats, labels to soft targets."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from tnt_jax.config import DataConfig


def normalise(
    images: UInt8[Array, "batch height width channels"], data: DataConfig
) -> Float[Array, "batch height width channels"]:
    """uint8 pixels to (x / 255 - mean) / std in float32."""
    return (images.astype(jnp.float32) / 255 - data.mean) / data.std


def prepare_training(
    images: UInt8[Array, "batch height width channels"],
    labels: Int[Array, " batch"],
    *,
    data: DataConfig,
    num_classes: int,
    key: PRNGKeyArray,
) -> tuple[Float[Array, "batch height width channels"], Float[Array, "batch classes"]]:
    """What the network is fed and what it should answer.

    Normalised images and target probabilities with label smoothing.
    """
    del key
    targets = jax.nn.one_hot(labels, num_classes) * (1 - data.label_smoothing) + data.label_smoothing / num_classes
    return normalise(images, data), targets
