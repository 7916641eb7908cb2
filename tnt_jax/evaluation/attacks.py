"""How little changes a prediction: adversarial images within a distance of the image, measured in its pixels."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from tnt_jax.config import InputError
from tnt_jax.data.mixing import Normalisation, normalise
from tnt_jax.models.variants import Model

Attack = Literal["fgsm", "pgd"]
Pixels = Float[Array, "batch height width channels"]


def read_epsilon(text: str) -> float:
    """A distance of pixels from 0 to 1, written as a number or a fraction, such as `8/255`.

    Raises:
        InputError: it is neither, or lies outside.
    """
    above, slash, below = text.partition("/")
    try:
        value = float(above) / float(below) if slash else float(above)
    except (ValueError, ZeroDivisionError):
        value = float("nan")
    if not 0 < value <= 1:
        raise InputError(f"epsilon is {text}, and must be a number above 0 and at most 1, such as 8/255 or 0.03")
    return value


def adversarial(
    model: Model,
    pixels: Pixels,
    labels: Int[Array, " batch"],
    normalisation: Normalisation,
    *,
    attack: Attack,
    epsilon: float,
    steps: int,
    key: PRNGKeyArray,
) -> Pixels:
    """Images near `pixels` that the model gets wrong, if the attack finds them: those of the highest loss that it saw.

    They are whole numbers, as an image file holds them, so that what is measured is what can be written.

    Args:
        pixels: from 0 to 255.
        epsilon: the largest change of a pixel, of a range of 1.
        attack: "fgsm", one step along the sign of the gradient (Goodfellow et al., arXiv 1412.6572), or "pgd", `steps`
            steps of 2.5 epsilon / steps from a random start (Madry et al., arXiv 1706.06083).
    """
    largest = jnp.floor(255 * epsilon + 1e-4)  # a whole number of pixel values: rounding then leaves no more than that

    def loss(pixels: Pixels) -> Float[Array, " batch"]:
        log = jax.nn.log_softmax(model(normalise(pixels, normalisation)).astype(jnp.float32))
        return -jnp.take_along_axis(log, labels[:, None], axis=1)[:, 0]

    def near(changed: Pixels) -> Pixels:
        return jnp.clip(jnp.clip(changed, pixels - largest, pixels + largest), 0, 255)

    gradient = jax.grad(lambda pixels: loss(pixels).sum())
    pixels = pixels.astype(jnp.float32)
    if attack == "fgsm":
        return near(pixels + largest * jnp.sign(gradient(pixels)))

    def step(state: tuple[Pixels, Pixels, Array], _: None) -> tuple[tuple, None]:
        at, best, highest = state
        at = near(at + 2.5 * largest / steps * jnp.sign(gradient(at)))
        rounded = near(jnp.round(at))
        found = loss(rounded)
        better = found > highest
        return (at, jnp.where(better[:, None, None, None], rounded, best), jnp.where(better, found, highest)), None

    start = near(pixels + jax.random.uniform(key, pixels.shape, minval=-largest, maxval=largest))
    (_, best, _), _ = jax.lax.scan(step, (start, pixels, loss(pixels)), length=steps)
    return best
