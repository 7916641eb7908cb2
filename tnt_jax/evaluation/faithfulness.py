"""Is a map right about the model? What happens to the class when the places that it names are taken away or put in."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tnt_jax.models.variants import Model

STEPS = 16


def deletion_and_insertion(
    model: Model,
    images: Float[Array, "batch height width channels"],
    classes: Int[Array, " batch"],
    maps: Float[Array, "batch rows columns"],
    *,
    steps: int = STEPS,
) -> tuple[Float[Array, "batch points"], Float[Array, "batch points"]]:
    """The probability of the class while places go, the highest of the map first, and while they come.

    What is deleted becomes the mean colour, which is 0 once normalised; what is inserted stands in a blurred image, in
    which every patch has one colour that runs into its neighbours'. A faithful map loses the class early (a small area
    under the first curve) and gains it early (a large one under the second).
    Source: Petsiuk et al., arXiv 1806.07421, algorithm 1.

    Args:
        images: normalised.

    Returns:
        Both curves, at 0, 1 / steps, ..., 1 of the places.
    """
    batch, height, width, channels = images.shape
    rows, columns = maps.shape[1:]
    # The rank of each place: 0 is the highest. Equal ones go in their order.
    ranks = jnp.argsort(jnp.argsort(-maps.reshape(batch, -1), axis=1), axis=1).reshape(maps.shape)
    ranks = ranks[:, np.arange(height) * rows // height][:, :, np.arange(width) * columns // width, None]
    patch = model.config.patch_size
    small = jax.image.resize(images, (batch, height // patch, width // patch, channels), "linear", antialias=True)
    blurred = jax.image.resize(small, images.shape, "linear")

    def probabilities(count: Array) -> tuple[Array, Array]:
        named = ranks < count

        def of_class(images: Array) -> Array:
            chances = jax.nn.softmax(model(images).astype(jnp.float32))
            return jnp.take_along_axis(chances, classes[:, None], axis=1)[:, 0]

        return of_class(jnp.where(named, 0.0, images)), of_class(jnp.where(named, images, blurred))

    counts = jnp.round(jnp.arange(steps + 1) / steps * rows * columns)
    deleted, inserted = jax.lax.map(probabilities, counts)
    return deleted.T, inserted.T


def area(curves: Float[Array, "batch points"]) -> Float[Array, " batch"]:
    """The area under each curve over the share of the places, by the trapezoidal rule: from 0 to 1."""
    return (curves[:, :-1] + curves[:, 1:]).mean(axis=1) / 2
