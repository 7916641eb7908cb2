"""The outer transformer layer as two Pallas kernels for TPUs: forward, and backward, which computes the forward again.

The tokens of an image are few: with the weights of the layer they fit into VMEM, so a kernel goes from image to image
and nothing of a layer but the tokens is ever read from HBM or written there.

Two heads of 64 channels lie side by side in the 128 lanes of a register, and are never taken apart: a product of one of
them has zeros in the lanes of the other, which costs a matrix unit nothing, as it has room for 128 either way. Where
lanes are free, a row's sum rides along with a product: the lanes of the other head hold ones.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tnt_jax.models.kernels.parameters import LayerParameters
from tnt_jax.models.kernels.tpu.tile import LANES, VMEM_LIMIT, dot, gelu_and_derivative, start_sums

HEAD_DIM = LANES // 2
BYTES_OF_SUMS = 4  # the gradients of the parameters are float32


def covers(tokens: int, dim: int, hidden: int, heads: int, dtype: DTypeLike) -> bool:
    """Whether the kernels can run a layer: two heads fill a register, and everything has room in VMEM."""
    if heads % 2 or dim != heads * HEAD_DIM or hidden % LANES:
        return False
    matrices, width = dim * (4 * dim + 2 * hidden), jnp.dtype(dtype).itemsize
    of_parameters = matrices * (width + BYTES_OF_SUMS)
    rows, keys = -(-tokens // 16) * 16, -(-tokens // LANES) * LANES
    of_tokens = rows * (heads * keys * width + 4 * (8 * dim + 3 * hidden))
    return of_parameters + of_tokens <= VMEM_LIMIT


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


def forward_kernel(epsilon: float, keep_ref, x_ref, *refs) -> None:
    """`keep_ref` (2, images): what the residual branch of attention and that of the MLP are multiplied by."""
    layer, y_ref, image = LayerParameters(*refs[:-1]), refs[-1], pl.program_id(0)
    *_, x, _, _, z = to_hidden(layer, epsilon, x_ref[0].astype(jnp.float32), keep_ref[0, image])
    hidden = gelu_and_derivative(z, exact=layer.fc2.dtype == jnp.float32)[0].astype(layer.fc2.dtype)
    y = x + (dot(hidden, layer.fc2[...]) + layer.fc2_bias[...]) * keep_ref[1, image]
    y_ref[0] = y.astype(y_ref.dtype)


def backward_kernel(epsilon: float, keep_ref, x_ref, dy_ref, *refs) -> None:
    """Gradients of the tokens and, summed over the images, of the parameters."""
    count, image = len(LayerParameters._fields), pl.program_id(0)
    layer, dx_ref, gradients = LayerParameters(*refs[:count]), refs[count], LayerParameters(*refs[count + 1 :])
    dtype = layer.qkv.dtype
    start_sums(gradients)

    def add(name: str, inputs: Array, dout: Array) -> None:
        getattr(gradients, name)[...] += dot(inputs, dout, (0, 0))

    part1, h1, attention, _, part2, h2, z = to_hidden(layer, epsilon, x_ref[0].astype(jnp.float32), keep_ref[0, image])
    hidden, derivative = gelu_and_derivative(z, exact=dtype == jnp.float32)
    dy = dy_ref[0].astype(jnp.float32)
    dout = dy * keep_ref[1, image]
    gradients.fc2_bias[...] += jnp.sum(dout, 0, keepdims=True)
    dout = dout.astype(dtype)
    add("fc2", hidden.astype(dtype), dout)
    dz = dot(dout, layer.fc2[...], (1, 1)) * derivative
    gradients.fc1_bias[...] += jnp.sum(dz, 0, keepdims=True)
    dz = dz.astype(dtype)
    add("fc1", h2, dz)
    dh = dot(dz, layer.fc1[...], (1, 1))
    dx = dy + through_norm(dh, *part2, layer.norm2_scale, gradients.norm2_scale, gradients.norm2_bias)
    dout = dx * keep_ref[0, image]
    gradients.proj_bias[...] += jnp.sum(dout, 0, keepdims=True)
    dout = dout.astype(dtype)
    add("proj", attention.out.astype(dtype), dout)
    dqkv = attention.gradient(dot(dout, layer.proj[...], (1, 1))).astype(dtype)
    add("qkv", h1, dqkv)
    dh = dot(dqkv, layer.qkv[...], (1, 1))
    dx = dx + through_norm(dh, *part1, layer.norm1_scale, gradients.norm1_scale, gradients.norm1_bias)
    dx_ref[0] = dx.astype(dx_ref.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def outer_layer(
    epsilon: float,
    interpret: bool,
    tokens: Float[Array, "batch tokens dim"],
    keep: Float[Array, "2 batch"],
    layer: LayerParameters,
) -> Float[Array, "batch tokens dim"]:
    """A transformer layer over the tokens of every image.

    `keep` is what each image's branch of attention and of the MLP is multiplied by: 1, or what stochastic depth has
    drawn. It has no gradient. `interpret` runs the kernels step by step on any platform, for tests.
    """
    return _forward(epsilon, interpret, tokens, keep, layer)


# Jitted, as in inner_block.py.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(epsilon: float, interpret: bool, tokens, keep, layer: LayerParameters) -> Array:
    (out,) = _over_images("outer_layer_forward", forward_kernel, epsilon, interpret, [tokens], keep, layer)
    return out


def _forward_saving(epsilon: float, interpret: bool, tokens, keep, layer: LayerParameters):
    return outer_layer(epsilon, interpret, tokens, keep, layer), (tokens, keep, layer)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _backward(epsilon: float, interpret: bool, saved, gradient):
    tokens, keep, layer = saved
    dtokens, *dlayer = _over_images(
        "outer_layer_backward", backward_kernel, epsilon, interpret, [tokens, gradient], keep, layer
    )
    return dtokens, jnp.zeros_like(keep), LayerParameters(*dlayer)


def _over_images(
    name: str, kernel, epsilon: float, interpret: bool, arrays: list[Array], keep: Array, layer: LayerParameters
) -> list[Array]:
    """Runs a kernel for one image after the other. With a second array, a gradient, it also returns the parameters'."""
    tokens, dtype = arrays[0], arrays[0].dtype
    batch, count, dim = tokens.shape
    backward = len(arrays) > 1
    parameters = [value if value.shape[0] == 1 else value.astype(dtype) for value in layer]
    sums = [jax.ShapeDtypeStruct(value.shape, jnp.float32) for value in layer] if backward else []
    image = pl.BlockSpec((1, count, dim), lambda image: (image, 0, 0))

    def whole(value) -> pl.BlockSpec:
        return pl.BlockSpec(value.shape, lambda image: (0, 0), pipeline_mode=pl.Buffered(1))

    macs = batch * count * (sum(value.size for value in layer if value.shape[0] > 1) + 2 * count * dim)
    moved = [*arrays, tokens, *parameters, *sums]
    call = pl.pallas_call(
        functools.partial(kernel, epsilon),
        grid=(batch,),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), *[image] * len(arrays), *map(whole, parameters)],
        out_specs=[image, *map(whole, sums)],
        out_shape=[jax.ShapeDtypeStruct(tokens.shape, dtype), *sums],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_LIMIT),
        cost_estimate=pl.CostEstimate(
            flops=macs * (8 if backward else 2),
            transcendentals=0,
            bytes_accessed=sum(value.size * value.dtype.itemsize for value in moved),
        ),
        interpret=interpret,
        name=name,
    )
    return call(keep, *arrays, *parameters)


outer_layer.defvjp(_forward_saving, _backward)
