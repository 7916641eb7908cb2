"""The outer transformer layer as two Pallas kernels for TPUs: forward, and backward, which computes the forward again.

The tokens of an image are few: with the weights of the layer they fit into VMEM, so a kernel goes from image to image
and nothing of a layer but the tokens is ever read from HBM or written there.

Two heads of 64 channels lie side by side in the 128 lanes of a register, and are never taken apart: a product of one of
them has zeros in the lanes of the other, which costs a matrix unit nothing, as it has room for 128 either way. Where
lanes are free, a row's sum rides along with a product: the lanes of the other head hold ones, and in the gradient -1,
which subtracts a row's mean from it. What the words give their sentences is added here, from where the kernel before
left it; in XLA the shift by the class token took 1.75 kilocycles of an image forward, 3.5 in training.

Four images a step; one a step took as many instructions forward and a twentieth more backward. Two images side by side
in one block of code took a thirtieth less, and twice as long to compile: not taken. The matrix units alone would take
more than nine tenths of what the kernels take on a v5e.

Arrays are told to lie in HBM: XLA otherwise puts some of them into VMEM, differently from block to block, and compiles
a kernel for each of the ways.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tnt_jax.models.kernels.parameters import LayerParameters
from tnt_jax.models.kernels.tpu.tile import (
    LANES,
    VMEM_LIMIT,
    Machine,
    Steps,
    compiler_params,
    dot,
    gelu_and_derivative,
    in_hbm,
    result_in_hbm,
)

HEAD_DIM = LANES // 2
IMAGES = 4  # of a step: what is added to their 196 patches then fills whole registers, as 4 * 196 rows side by side


def covers(tokens: int, dim: int, hidden: int, heads: int, dtype: DTypeLike) -> bool:
    """True if the kernels can run a layer: two heads fill a register, and everything has room in VMEM."""
    if heads % 2 or dim != heads * HEAD_DIM or hidden % LANES:
        return False
    width = jnp.dtype(dtype).itemsize
    of_parameters = dim * (4 * dim + 2 * hidden) * (width + 4)  # with their gradients in float32
    rows, keys = -(-tokens // 16) * 16, -(-tokens // LANES) * LANES
    of_image = rows * (heads * keys * width + 4 * (8 * dim + 3 * hidden))
    of_step = IMAGES * rows * dim * (10 * width + 12)  # five arrays, twice each, and scratch
    return of_parameters + of_image + of_step <= VMEM_LIMIT


def covers_added(patches: int) -> bool:
    """True if the kernels can add something to the patches of an image: it fills whole registers."""
    return IMAGES * patches % 16 == 0


class Attended:
    """Attention of one image, and what its gradient needs."""

    def __init__(self, qkv: Float[Array, "tokens three_dim"], dtype: DTypeLike):
        self.dim, self.dtype = qkv.shape[1] // 3, dtype
        self.first_half = lax.broadcasted_iota(jnp.int32, (1, LANES), 1) < HEAD_DIM
        self.pairs, out = [], []
        for start in range(0, self.dim, LANES):
            query, key, value = (qkv[:, at : at + LANES] for at in range(start, 3 * self.dim, self.dim))
            query = (query * HEAD_DIM**-0.5).astype(dtype)
            key, value = key.astype(dtype), value.astype(dtype)
            exponentials = [self._exponentials(self.of_head(half, query), key) for half in (0, 1)]
            # In the lanes of the other head, sums of the exponentials.
            found = [dot(e, self.of_head(half, value, 1)) for half, e in enumerate(exponentials)]
            scale = 1 / pltpu.roll(self.join(found[1], found[0]), HEAD_DIM, 1)
            out.append(self.join(*found) * scale)
            self.pairs.append((query, key, value, exponentials, scale, out[-1]))
        self.out = jnp.concatenate(out, 1)

    def _exponentials(self, query: Array, key: Array) -> Float[Array, "tokens tokens"]:
        scores = dot(query, key, (1, 1))
        return jnp.exp(scores - jnp.max(scores, 1, keepdims=True)).astype(self.dtype)

    def join(self, first: Array, second: Array) -> Array:
        """The lanes of the first head from one array, those of the second from another."""
        return jnp.where(self.first_half, first, second)

    def of_head(self, half: int, x: Array, other: Array | float = 0) -> Array:
        """The lanes of one head; those of the other hold `other`."""
        other = jnp.full_like(x, other) if isinstance(other, int) else other
        return self.join(x, other) if half == 0 else self.join(other, x)

    def gradient(self, dout: Float[Array, "tokens dim"]) -> Float[Array, "tokens three_dim"]:
        """Gradient of q, k and v from that of `out`."""
        parts: tuple[list, ...] = ([], [], [])
        for index, (query, key, value, exponentials, scale, out) in enumerate(self.pairs):
            # All that is not divided by the sums of the exponentials is divided here.
            scaled = dout[:, index * LANES : (index + 1) * LANES] * scale
            # A row's gradient less its mean, by one product: times the values, and times -1 in the lanes of the other.
            along = pltpu.roll(scaled * out, HEAD_DIM, 1).astype(self.dtype)
            scaled = scaled.astype(self.dtype)
            of_heads = []
            for half, e in enumerate(exponentials):
                dweights = dot(self.of_head(half, scaled, along), self.of_head(half, value, -1), (1, 1))
                dscores = (e * dweights).astype(self.dtype)
                of_heads.append((dot(dscores, key), dot(dscores, query, (0, 0)), dot(e, scaled, (0, 0))))
            for part, *halves in zip(parts, *of_heads, strict=True):
                part.append(self.join(*halves))
        dquery, dkey, dvalue = (jnp.concatenate(part, 1) for part in parts)
        return jnp.concatenate([dquery * HEAD_DIM**-0.5, dkey, dvalue], 1)


def normalise_rows(x: Array, epsilon: float) -> tuple[Array, Array]:
    """Rows with mean 0 and variance 1, and what they were multiplied by."""
    centred = x - jnp.mean(x, 1, keepdims=True)
    scale = lax.rsqrt(jnp.mean(centred * centred, 1, keepdims=True) + epsilon)
    return centred * scale, scale


def through_norm(dh: Array, normed: Array, scale: Array, norm_scale, dscale_ref, dbias_ref) -> Array:
    """Gradient of what a norm was given; those of its scale and bias are added up."""
    dbias_ref[...] += jnp.sum(dh, 0, keepdims=True)
    dscale_ref[...] += jnp.sum(dh * normed, 0, keepdims=True)
    gradient = dh * norm_scale[...]
    along = jnp.mean(gradient * normed, 1, keepdims=True)
    return scale * (gradient - jnp.mean(gradient, 1, keepdims=True) - normed * along)


def to_hidden(layer: LayerParameters, epsilon: float, x: Array, keep: Array) -> tuple:
    """From tokens to the hidden channels of the MLP before GELU, with all that the gradient needs."""
    dtype = layer.qkv.dtype
    part1 = normalise_rows(x, epsilon)
    h1 = (part1[0] * layer.norm1_scale[...] + layer.norm1_bias[...]).astype(dtype)
    attention = Attended(dot(h1, layer.qkv[...]), dtype)
    x = x + (dot(attention.out.astype(dtype), layer.proj[...]) + layer.proj_bias[...]) * keep
    part2 = normalise_rows(x, epsilon)
    h2 = (part2[0] * layer.norm2_scale[...] + layer.norm2_bias[...]).astype(dtype)
    return part1, h1, attention, x, part2, h2, dot(h2, layer.fc1[...]) + layer.fc1_bias[...]


class ImageSizes(NamedTuple):
    """The sizes that the kernels are compiled for."""

    batch: int
    tokens: int
    dim: int
    epsilon: float
    patches: int
    """The last tokens of an image, to which something is added; 0 where nothing is."""

    @property
    def has_added(self) -> bool:
        return self.patches > 0

    @property
    def scratch(self) -> list[tuple[int, ...]]:
        """Shapes of float32 arrays in VMEM: tokens, and what is added to the patches."""
        return [(IMAGES, self.tokens, self.dim), (IMAGES * self.patches or 8, self.dim)]

    def of_patches(self, image: int) -> tuple[int, slice]:
        """The patches of an image of a step among its tokens."""
        return image, slice(self.tokens - self.patches, None)

    def added(self, image: int) -> pl.Slice:
        """The rows of an image of a step in what is added."""
        return pl.ds(image * self.patches, self.patches)

    def for_images(self, step: Array, visit) -> None:
        """Calls `visit` with an image's index in the step and in the batch; the last step may have fewer."""
        first = step * IMAGES
        count = jnp.minimum(IMAGES, self.batch - first)
        lax.fori_loop(0, count, lambda image, _: visit(image, first + image) or 0, 0)


def start(sizes: ImageSizes, x_ref, added_refs: tuple, x32_ref, added32_ref) -> None:
    """The tokens in float32, with what is added to the patches of each image."""
    x32_ref[...] = x_ref[...].astype(jnp.float32)
    if sizes.has_added:
        (added_ref,) = added_refs
        added32_ref[...] = added_ref[...].astype(jnp.float32)
        for image in range(IMAGES):
            x32_ref[sizes.of_patches(image)] += added32_ref[sizes.added(image), :]


def forward_kernel(sizes: ImageSizes, step: Array, keep_ref, x_ref, *refs) -> None:
    """`keep_ref` (2, images): what the residual branch of attention and that of the MLP are multiplied by."""
    added_refs, refs = refs[: sizes.has_added], refs[sizes.has_added :]
    layer, (y_ref, *scratch) = LayerParameters(*refs[:-3]), refs[-3:]
    dtype = layer.fc2.dtype
    start(sizes, x_ref, added_refs, *scratch)

    def visit(image: Array, of_batch: Array) -> None:
        *_, x, _, _, z = to_hidden(layer, sizes.epsilon, scratch[0][image], keep_ref[0, of_batch])
        hidden = gelu_and_derivative(z, exact=dtype == jnp.float32)[0].astype(dtype)
        y = x + (dot(hidden, layer.fc2[...]) + layer.fc2_bias[...]) * keep_ref[1, of_batch]
        y_ref[image] = y.astype(y_ref.dtype)

    sizes.for_images(step, visit)


def backward_kernel(sizes: ImageSizes, step: Array, keep_ref, x_ref, *refs) -> None:
    """Gradients of the tokens, of what is added and, summed over the images, of the parameters."""
    added_refs, (dy_ref, *refs) = refs[: sizes.has_added], refs[sizes.has_added :]
    count = len(LayerParameters._fields)
    layer, dx_ref, *refs = LayerParameters(*refs[:count]), *refs[count:]
    dadded_refs, refs = refs[: sizes.has_added], refs[sizes.has_added :]
    gradients, (x32_ref, added32_ref) = LayerParameters(*refs[:count]), refs[count:]
    dtype = layer.qkv.dtype

    start(sizes, x_ref, added_refs, x32_ref, added32_ref)

    def add(name: str, inputs: Array, dout: Array) -> None:
        getattr(gradients, name)[...] += dot(inputs, dout, (0, 0))

    def visit(image: Array, of_batch: Array) -> None:
        part1, h1, attention, _, part2, h2, z = to_hidden(layer, sizes.epsilon, x32_ref[image], keep_ref[0, of_batch])
        hidden, derivative = gelu_and_derivative(z, exact=dtype == jnp.float32)
        dy = dy_ref[image].astype(jnp.float32)
        dout = dy * keep_ref[1, of_batch]
        gradients.fc2_bias[...] += jnp.sum(dout, 0, keepdims=True)
        dout = dout.astype(dtype)
        add("fc2", hidden.astype(dtype), dout)
        dz = dot(dout, layer.fc2[...], (1, 1)) * derivative
        gradients.fc1_bias[...] += jnp.sum(dz, 0, keepdims=True)
        dz = dz.astype(dtype)
        add("fc1", h2, dz)
        dh = dot(dz, layer.fc1[...], (1, 1))
        dx = dy + through_norm(dh, *part2, layer.norm2_scale, gradients.norm2_scale, gradients.norm2_bias)
        dout = dx * keep_ref[0, of_batch]
        gradients.proj_bias[...] += jnp.sum(dout, 0, keepdims=True)
        dout = dout.astype(dtype)
        add("proj", attention.out.astype(dtype), dout)
        dqkv = attention.gradient(dot(dout, layer.proj[...], (1, 1))).astype(dtype)
        add("qkv", h1, dqkv)
        dh = dot(dqkv, layer.qkv[...], (1, 1))
        dx = dx + through_norm(dh, *part1, layer.norm1_scale, gradients.norm1_scale, gradients.norm1_bias)
        # The tokens have done their part: their place takes their gradient.
        x32_ref[image] = dx

    sizes.for_images(step, visit)
    dx_ref[...] = x32_ref[...].astype(dx_ref.dtype)
    for dadded_ref in dadded_refs:
        for image in range(IMAGES):
            added32_ref[sizes.added(image), :] = x32_ref[sizes.of_patches(image)]
        dadded_ref[...] = added32_ref[...].astype(dadded_ref.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def outer_layer(
    epsilon: float,
    machine: Machine,
    tokens: Float[Array, "batch tokens dim"],
    added: Float[Array, "rows dim"] | None,
    keep: Float[Array, "2 batch"],
    layer: LayerParameters,
) -> Float[Array, "batch tokens dim"]:
    """A transformer layer over the tokens of every image.

    `added` is added first to the patches, the last tokens of an image; those of all images lie one after the other.
    `keep` is what each image's branch of attention and of the MLP is multiplied by: 1, or what stochastic depth has
    drawn. It has no gradient.
    """
    return _forward(epsilon, machine, tokens, added, keep, layer)


# Jitted, as in inner_block.py.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(epsilon: float, machine: Machine, tokens, added, keep, layer: LayerParameters) -> Array:
    (out,) = _over_images("outer_layer_forward", forward_kernel, epsilon, machine, tokens, added, None, keep, layer)
    return out


def _forward_saving(epsilon: float, machine: Machine, tokens, added, keep, layer: LayerParameters):
    return outer_layer(epsilon, machine, tokens, added, keep, layer), (tokens, added, keep, layer)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _backward(epsilon: float, machine: Machine, saved, gradient):
    tokens, added, keep, layer = saved
    dtokens, *rest = _over_images(
        "outer_layer_backward", backward_kernel, epsilon, machine, tokens, added, gradient, keep, layer
    )
    dadded = None if added is None else rest.pop(0)
    return dtokens, dadded, jnp.zeros_like(keep), LayerParameters(*rest)


def _over_images(name: str, kernel, epsilon: float, machine: Machine, tokens, added, gradient, keep, layer) -> list:
    """Runs a kernel for a few images after the other.

    Returns: an array like the tokens; with a gradient given also one like `added`, if there is one, and for each of the
    parameters.
    """
    batch, count, dim = tokens.shape
    sizes = ImageSizes(batch, count, dim, epsilon, 0 if added is None else added.shape[0] // batch)
    parameters = [value if value.shape[0] == 1 else value.astype(tokens.dtype) for value in layer]
    arrays = [array for array in (tokens, added, gradient) if array is not None]
    results = [tokens] if gradient is None or added is None else [tokens, added]
    results = [jax.ShapeDtypeStruct(result.shape, result.dtype) for result in results]
    sums = [] if gradient is None else [jax.ShapeDtypeStruct(value.shape, jnp.float32) for value in layer]

    steps = Steps.shared(pl.cdiv(batch, IMAGES), machine.cores)
    added_up = [jax.ShapeDtypeStruct((steps.cores, *each.shape), each.dtype) for each in sums]

    def of_step(array) -> pl.BlockSpec:
        if array.ndim == 3:
            return pl.BlockSpec((IMAGES, count, dim), lambda *at: (steps.of(*at), 0, 0))
        return pl.BlockSpec((IMAGES * sizes.patches, dim), lambda *at: (steps.of(*at), 0))

    def whole(value) -> pl.BlockSpec:
        return pl.BlockSpec(value.shape, lambda *at: (0, 0), pipeline_mode=pl.Buffered(1))

    def of_core(value) -> pl.BlockSpec:
        return pl.BlockSpec((None, *value.shape[1:]), lambda core, _: (core, 0, 0), pipeline_mode=pl.Buffered(1))

    def body(*refs) -> None:
        before = 1 + len(arrays) + len(parameters) + len(results)
        steps.run(lambda step: kernel(sizes, step, *refs), refs[before : before + len(sums)])

    macs = batch * count * (sum(value.size for value in layer if value.shape[0] > 1) + 2 * count * dim)
    moved = [*arrays, *results, *parameters, *added_up]
    call = pl.pallas_call(
        body,
        grid=steps.grid,
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), *map(of_step, arrays), *map(whole, parameters)],
        out_specs=[*map(of_step, results), *map(of_core, added_up)],
        out_shape=[result_in_hbm(each, machine) for each in (*results, *added_up)],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in sizes.scratch],
        compiler_params=compiler_params(adds_up=gradient is not None),
        cost_estimate=pl.CostEstimate(
            flops=macs * (2 if gradient is None else 8),
            transcendentals=0,
            bytes_accessed=sum(value.size * value.dtype.itemsize for value in moved),
        ),
        interpret=machine.interpret,
        name=name,
    )
    returned = call(keep, *(in_hbm(array, machine) for array in (*arrays, *parameters)))
    return [*returned[: len(results)], *(each.sum(0) for each in returned[len(results) :])]


outer_layer.defvjp(_forward_saving, _backward)
