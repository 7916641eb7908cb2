"""TPU kernels on chips whose two cores share the steps, in Pallas' own interpreter, where unwritten memory is NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from tnt_jax.models.kernels.parameters import LayerParameters
from tnt_jax.models.kernels.tpu import inner_block, outer_layer, tile, words_to_sentence

EPSILON = 1e-5
MACHINES = {
    "one core": tile.Machine(1, False, True),
    "two cores": tile.Machine(2, False, pltpu.InterpretParams(uninitialized_memory="nan", num_cores_or_threads=2)),
}


def random(*shape):
    return jnp.asarray(np.random.default_rng(len(shape) + sum(shape)).standard_normal(shape) / 4, jnp.float32)


def layer_parameters(channels, hidden, *, columns):
    """As the inner kernel takes them, vectors in columns and matrices from the left, or as the outer one does."""

    def vector(count):
        return random(count, 1) if columns else random(1, count)

    def matrix(inputs, outputs):
        return random(outputs, inputs) if columns else random(inputs, outputs)

    return LayerParameters(
        vector(channels) + 1, vector(channels), matrix(channels, 3 * channels), matrix(channels, channels),
        vector(channels), vector(channels) + 1, vector(channels), matrix(channels, hidden), vector(hidden),
        matrix(hidden, channels), vector(channels),
    )  # fmt: skip


def inner(machine, sentences):
    sizes = tile.Sizes(2, 8, 2, EPSILON, jnp.dtype("float32"))
    keep = jnp.ones((2, sentences))

    def run(x, layer):
        return inner_block.inner_block(sizes, machine, x, keep, layer)

    return run, (random(16, sentences), layer_parameters(8, 16, columns=True))


def outer(machine, images):
    keep = jnp.ones((2, images))

    def run(x, layer):
        return outer_layer.outer_layer(EPSILON, machine, x, None, keep, layer)

    return run, (random(images, 9, 128), layer_parameters(128, 128, columns=False))


def words(machine, sentences):
    parameters = words_to_sentence.Projection(
        random(128, 1) + 1, random(128, 1), random(128, 128), random(128, 1), random(128, 1) + 1, random(128, 1)
    )

    def run(x, parameters):
        return words_to_sentence.words_to_sentence(EPSILON, machine, x, parameters)[1]

    return run, (random(128, sentences), parameters)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "count"),
    [(words, 196), (outer, 4)]
    + [pytest.param(*case, marks=pytest.mark.nightly) for case in ((words, 1500), (inner, 196), (outer, 5))],
)
def test_two_cores_write_what_one_core_writes(kernel, count):
    """Also where there is one step for both: the idle core must not copy memory over the result."""

    def value_and_gradients(machine):
        run, arguments = kernel(machine, count)
        out, pull_back = jax.vjp(run, *arguments)
        return jax.tree.leaves((out, pull_back(jnp.ones_like(out))))

    expected, found = (value_and_gradients(machine) for machine in MACHINES.values())
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
