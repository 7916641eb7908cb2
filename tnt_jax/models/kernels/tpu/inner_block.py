"""The inner transformer layer as two Pallas kernels for TPUs: forward, and backward, which computes the forward again.

The words of a patch are few and narrow: 16 words of 24 channels fill an eighth of a TPU's registers however they are
transposed. So a tile holds 1,024 sentences, and its arrays lie in the two ways that fill the registers whole:

- For norms, matrix products and GELU, a register holds 8 channels of one word of 128 sentences: a matrix product reads
  and writes registers of channels.
- For attention, a register holds one channel of one word of all 1,024 sentences: scores, softmax and sums over words
  are then plain arithmetic between registers, without one move inside of them.

A strided load or store in VMEM turns the one into the other and costs nothing, as long as the stride is odd: the banks
of VMEM then do not collide. In HBM the words are a matrix (words * channels, sentences), a transposed view of the
(sentences, words, channels) that the rest of the model has. Nothing else of the layer ever leaves VMEM.

What bounds the kernels is the arithmetic between registers, so all that a matrix product can do is left to it: norms'
scales and biases, the biases of the linear maps and constant factors are folded into matrices (folded_layer.py), which
take two words at a time. Each stage runs for two pairs of words and all sentences before the next one, and attention
takes two queries at a time. Where a TPU has registers of bfloat16 (v6e, v7x), attention and GELU compute in them, and
the last additions of a softmax's sum are float32.

What that was worth, in instructions of libtpu 0.0.42 for a v5e, forward, 1,024 sentences: 47,100 with 128 sentences on
the lanes and channels transposed in registers, 45,700 with tiles of 1,024 and strides that collide, 36,500 with strides
that do not, 26,400 with each stage for all sentences before the next, 17,500 with two words at a time and all that
matrices can take. The arithmetic between registers alone would be 13,100, in attention it fills 92% of its slots. Tried
and not taken: one span of sentences after the other, and chains of stages that start one behind the other; registers
suffice for both, and more slots stay empty.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from tnt_jax.models.kernels.parameters import LayerParameters
from tnt_jax.models.kernels.tpu.folded_layer import (
    ONES,
    Backward,
    Folded,
    Forward,
    backward_matrices,
    fold,
    folded_gradient,
    forward_matrices,
)
from tnt_jax.models.kernels.tpu.pairs import (
    PAIRS_OF_PROJECTION,
    Norm,
    Stages,
    for_pairs,
    lanes_of,
    per_word,
    rows_of_pair,
    with_ones,
)
from tnt_jax.models.kernels.tpu.tile import (
    SUBLANES,
    TILE,
    Machine,
    PerSentence,
    Sizes,
    dot,
    gelu_scale,
    is_sentence,
    over_tiles,
    scaled_gelu,
)
from tnt_jax.models.kernels.tpu.words_attention import (
    Registers,
    attend,
    attention_gradients,
    registers,
)


class Norm1(NamedTuple):
    """Means of all words in VMEM, and what the first norm multiplied them by; eight times."""

    mean: Any
    scale: Any

    @staticmethod
    def scratch(sizes: Sizes) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct((sizes.words * SUBLANES, TILE), jnp.float32)] * 2

    def of_pair(self, pair: Array, span: int) -> tuple:
        rows = pl.ds(pl.multiple_of(pair * 2 * SUBLANES, 2 * SUBLANES), 2 * SUBLANES)
        return rows, lanes_of(span)

    def again(self, x: Array, pair: Array, span: int) -> tuple[Array, Array]:
        """The norm of two words, of which this has been computed before, and what they were multiplied by."""
        at = self.of_pair(pair, span)
        scale = self.scale[at]
        centred = per_word(jnp.subtract, x.astype(jnp.float32), self.mean[at])
        return per_word(jnp.multiply, centred, scale), scale


def project_qkv(sizes: Sizes, matrices: Forward, x_ref, norm1: Norm1, query: Registers, key_value: Registers) -> None:
    """Writes q, k and v of all words as registers of one channel.

    Packed, a register has two words of q, and a word of k or v twice.
    """
    channels, norm = sizes.channels, Norm(sizes, matrices.sums)

    def project(pair: Array, span: int) -> Stages:
        x, at = x_ref[rows_of_pair(sizes, pair), lanes_of(span)], norm1.of_pair(pair, span)
        mean = norm.mean(x)
        yield
        h, scale = yield from norm(x.astype(jnp.float32), mean)
        norm1.mean[at], norm1.scale[at] = mean, scale
        qkv = dot(matrices.qkv[...], with_ones(h, sizes.dtype))
        yield
        if query.packed:
            qkv = pltpu.bitcast(qkv.astype(jnp.bfloat16), jnp.uint32)
        parts = [qkv[start : start + channels] for start in range(0, qkv.shape[0], channels)]
        of_query = (pair,) if query.packed else (2 * pair, 2 * pair + 1)
        for word in of_query:
            query.spread(0, word, span, parts.pop(0))
        for index, values in enumerate(parts):
            part, word = divmod(index, 2)
            key_value.spread(part * channels, 2 * pair + word, span, values)

    for_pairs(sizes, project, PAIRS_OF_PROJECTION)


def forward_kernel(sizes: Sizes, saves: bool, first: Array, x_ref, keep_ref, *refs) -> None:
    """`keep_ref` (2, sentences): what the residual branch of attention and that of the MLP are multiplied by."""
    count = len(Forward._fields)
    matrices, y_ref, attended_refs = Forward(*refs[:count]), refs[count], refs[count + 1 : -4]
    norm1, key_value = Norm1(*refs[-4:-2]), Registers(refs[-1], sizes.words)
    query = Registers(refs[-2], sizes.words // (2 if key_value.packed else 1))
    activations = jnp.bfloat16 if query.packed else jnp.float32
    project_qkv(sizes, matrices, x_ref, norm1, query, key_value)
    attend(sizes, query, key_value)

    def rest(pair: Array, span: int) -> Stages:
        rows, lanes = rows_of_pair(sizes, pair), lanes_of(span)
        attended = attended_of_pair(sizes, query, pair, span)
        for attended_ref in attended_refs:
            attended_ref[rows, lanes] = attended.astype(sizes.dtype)
        x, (h, _) = yield from to_second_norm(
            sizes, matrices, x_ref[rows, lanes], norm1.mean[norm1.of_pair(pair, span)], keep_ref[0:1, lanes], attended
        )
        h = with_ones(h, sizes.dtype)
        yield
        z = [dot(fc1, h).astype(activations) for fc1 in of_each_word(matrices.fc1)]
        yield
        hidden = [scaled_gelu(z, exact=sizes.exact)[0] for z in z]
        yield
        out = jnp.concatenate([dot(matrices.fc2[...], with_ones(each, sizes.dtype)) for each in hidden])
        yield
        y_ref[rows, lanes] = (x + out * keep_ref[1:2, lanes]).astype(y_ref.dtype)

    for_pairs(sizes, rest)


def of_each_word(ref) -> list[Array]:
    """The halves of a matrix for two words."""
    half = ref.shape[0] // 2
    return [ref[:half], ref[half:]]


def attended_of_pair(sizes: Sizes, query: Registers, pair: Array, span: int) -> Float[Array, "channels span"]:
    """The output of attention for two words; packed, a channel of both before the next channel."""
    if query.packed:
        return pltpu.bitcast(query.gather(0, sizes.channels, pair, span), jnp.bfloat16)
    return jnp.concatenate([query.gather(0, sizes.channels, 2 * pair + word, span) for word in (0, 1)])


def to_second_norm(
    sizes: Sizes, matrices: Forward, x: Array, mean: Array, keep: Float[Array, "1 span"], attended: Array
) -> Stages:
    """From what attention found for two words to the second norm.

    Returns: the words after attention; of the norm the result and what it multiplied by.
    """
    count, norm = 2 * sizes.channels, Norm(sizes, matrices.sums)
    out = dot(matrices.proj[...], with_ones(attended, sizes.dtype))
    yield
    x = x.astype(jnp.float32) + out[:count] * keep
    return x, (yield from norm(x, mean + out[count:] * keep))


def backward_kernel(sizes: Sizes, sentences: int, first: Array, *refs) -> None:
    """Gradients of the words and, summed over the tiles, of the folded matrices: `fc2` as it is, the others with inputs
    of two words and ones as rows, and outputs of two words as columns."""
    (x_ref, keep_ref, attended_ref, dy_ref), refs = refs[:4], refs[4:]
    matrices, refs = Forward(*refs[: len(Forward._fields)]), refs[len(Forward._fields) :]
    transposed, (dx_ref, *refs) = Backward(*refs[: len(Backward._fields)]), refs[len(Backward._fields) :]
    gradients, norm1, (dx32_ref, *scratch) = Folded(*refs[:4]), Norm1(*refs[4:6]), refs[6:]
    key_value, dkey_value = (Registers(ref, sizes.words) for ref in scratch[1::2])
    packed = key_value.packed
    query, dattended = (Registers(ref, sizes.words // (2 if packed else 1)) for ref in scratch[::2])
    # Where registers are packed, GELU and what surrounds it is computed in bfloat16 too.
    activations = jnp.bfloat16 if packed else jnp.float32
    channels, dtype, norm = sizes.channels, sizes.dtype, Norm(sizes, matrices.sums)

    clear_beyond(first, sentences, (x_ref, keep_ref, attended_ref, dy_ref))
    project_qkv(sizes, matrices, x_ref, norm1, query, key_value)

    def mlp(pair: Array, span: int) -> Stages:
        rows, lanes = rows_of_pair(sizes, pair), lanes_of(span)
        attended, keep = attended_ref[rows, lanes].astype(activations), keep_ref[0:1, lanes]
        _, parts = yield from to_second_norm(
            sizes, matrices, x_ref[rows, lanes], norm1.mean[norm1.of_pair(pair, span)], keep, attended
        )
        h = with_ones(parts[0], dtype)
        dout = dy_ref[rows, lanes].astype(jnp.float32) * keep_ref[1:2, lanes]
        dz = []
        dh = []
        for word, (fc1, fc2) in enumerate(zip(of_each_word(matrices.fc1), of_each_word(transposed.fc2), strict=True)):
            yield
            z = dot(fc1, h).astype(activations)
            dhidden = dot(fc2, dout.astype(dtype)).astype(activations)
            yield
            hidden, slope = scaled_gelu(z, exact=sizes.exact, derivative=True)
            dz.append((dhidden * slope).astype(dtype))
            of_word = dout[word * channels : (word + 1) * channels].astype(dtype)
            yield
            gradients.fc2[...] += dot(of_word, with_ones(hidden, dtype), (1, 1))
            dh.append(dot(transposed.fc1[...], dz[-1]))
        yield
        gradients.fc1[...] += dot(h, jnp.concatenate(dz), (1, 1))
        change = yield from norm.gradient(jnp.concatenate(dh), *parts)
        dx = dy_ref[rows, lanes].astype(jnp.float32) + change
        dx32_ref[rows, lanes] = dx
        dout = (dx * keep).astype(dtype)
        yield
        gradients.proj[...] += dot(with_ones(attended, dtype), dout, (1, 1))
        of_attention = dot(transposed.proj[...], dout)
        yield
        spread_pair(dattended, pair, span, of_attention)
        for word in (0, 1) if span == 0 else ():
            dkey_value.clear(2 * pair + word)

    for_pairs(sizes, mlp)
    attention_gradients(sizes, query, key_value, dattended, dkey_value)

    def through_qkv(pair: Array, span: int) -> Stages:
        rows, lanes = rows_of_pair(sizes, pair), lanes_of(span)
        parts = norm1.again(x_ref[rows, lanes], pair, span)
        dqkv = dqkv_of_pair(sizes, query, dkey_value, pair, span)
        yield
        gradients.qkv[...] += dot(with_ones(parts[0], dtype), jnp.concatenate(dqkv).astype(dtype), (1, 1))
        dh = jnp.concatenate([dot(transposed.qkv[...], each.astype(dtype)) for each in dqkv])
        change = yield from norm.gradient(dh, *parts)
        dx_ref[rows, lanes] = (dx32_ref[rows, lanes] + change).astype(dx_ref.dtype)

    for_pairs(sizes, through_qkv)


def clear_beyond(first: Array, sentences: int, refs: Sequence) -> None:
    """Zeros where a tile has no more sentences."""

    @pl.when(first + TILE > sentences)
    def _():
        there = is_sentence(first, sentences)
        for ref in refs:
            ref[...] = jnp.where(there, ref[...].astype(jnp.float32), 0).astype(ref.dtype)


def spread_pair(registers: Registers, pair: Array, span: int, values: Float[Array, "channels span"]) -> None:
    """Writes the channels of two words; packed, a channel of both comes before the next channel."""
    if registers.packed:
        registers.spread(0, pair, span, pltpu.bitcast(values.astype(jnp.bfloat16), jnp.uint32))
        return
    for word, of_word in enumerate(jnp.split(values, 2)):
        registers.spread(0, 2 * pair + word, span, of_word)


def dqkv_of_pair(
    sizes: Sizes, dquery: Registers, dkey_value: Registers, pair: Array, span: int
) -> list[Float[Array, "rows span"]]:
    """q, k and v of each of two words. Packed, one array: q of both words, a channel of both before the next; then for
    each word k and v, every channel in two halves."""
    of_words = [dkey_value.gather(0, 2 * sizes.channels, 2 * pair + word, span) for word in (0, 1)]
    if dquery.packed:
        of_query = dquery.gather(0, sizes.channels, pair, span)
        return [pltpu.bitcast(jnp.concatenate([of_query, *of_words]), jnp.bfloat16)]
    of_queries = [dquery.gather(0, sizes.channels, 2 * pair + word, span) for word in (0, 1)]
    return [jnp.concatenate(parts) for parts in zip(of_queries, of_words, strict=True)]


def inner_block(
    sizes: Sizes,
    machine: Machine,
    words: Float[Array, "flat sentences"],
    keep: Float[Array, "2 sentences"],
    layer: LayerParameters,
) -> Float[Array, "flat sentences"]:
    """A transformer layer over the words of every sentence.

    `keep` is what each sentence's branch of attention and of the MLP is multiplied by: 1, or what stochastic depth has
    drawn. It has no gradient.
    """
    return _inner_block(sizes, machine, words, keep, fold(layer, sizes.head_dim, gelu_scale(sizes.dtype)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _inner_block(sizes: Sizes, machine: Machine, words, keep, folded: Folded) -> Array:
    (out,) = _forward(sizes, machine, words, keep, folded, saves=False)
    return out


def packs_registers(sizes: Sizes, machine: Machine) -> bool:
    """True if attention and GELU compute in bfloat16, attention with two words in a register."""
    return machine.packs and jnp.dtype(sizes.dtype) == jnp.bfloat16


# Jitted, so that a network of many blocks traces each kernel, and turns it into a program, once.
@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="saves")
def _forward(sizes: Sizes, machine: Machine, words, keep, folded: Folded, *, saves: bool) -> list[Array]:
    results = [PerSentence(jax.ShapeDtypeStruct(words.shape, words.dtype))]
    if saves:
        results.append(PerSentence(jax.ShapeDtypeStruct(words.shape, sizes.dtype)))
    packs = packs_registers(sizes, machine)
    kept = jnp.uint32 if packs else jnp.float32
    return over_tiles(
        "inner_block_forward",
        functools.partial(forward_kernel, sizes, saves),
        [PerSentence(words), PerSentence(keep)],
        forward_matrices(folded, sizes.dtype, packed=packs),
        results,
        scratch=[
            *Norm1.scratch(sizes),
            jax.ShapeDtypeStruct(registers(sizes.channels, sizes.words // (2 if packs else 1)), kept),
            jax.ShapeDtypeStruct(registers(2 * sizes.channels, sizes.words), kept),
        ],
        flops=words.shape[1] * flops(sizes, folded),
        machine=machine,
    )


def _forward_saving(sizes: Sizes, machine: Machine, words, keep, folded: Folded):
    out, attended = _forward(sizes, machine, words, keep, folded, saves=True)
    return out, (words, keep, attended, folded)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _backward(sizes: Sizes, machine: Machine, saved, gradient):
    words, keep, attended, folded = saved
    rows, sentences = words.shape
    channels, hidden, packs = sizes.channels, folded.fc1.shape[0], packs_registers(sizes, machine)
    matrices = forward_matrices(folded, sizes.dtype, packed=packs), backward_matrices(folded, sizes.dtype, packed=packs)
    inputs, of_qkv = 2 * channels + ONES, (10 if packs else 6) * channels
    queries, kept = sizes.words // (2 if packs else 1), jnp.uint32 if packs else jnp.float32
    of_query = jax.ShapeDtypeStruct(registers(channels, queries), kept)
    of_key_value = jax.ShapeDtypeStruct(registers(2 * channels, sizes.words), kept)
    dwords, *sums = over_tiles(
        "inner_block_backward",
        functools.partial(backward_kernel, sizes, sentences),
        [PerSentence(array) for array in (words, keep, attended, gradient)],
        [*matrices[0], *matrices[1]],
        [PerSentence(jax.ShapeDtypeStruct(words.shape, words.dtype))],
        sums=Folded((inputs, of_qkv), (inputs, 2 * channels), (inputs, 2 * hidden), (channels, hidden + ONES)),
        scratch=[
            *Norm1.scratch(sizes),
            jax.ShapeDtypeStruct((rows, TILE), jnp.float32),
            *[of_query, of_key_value] * 2,
        ],
        flops=3 * sentences * flops(sizes, folded),
        machine=machine,
    )
    return dwords, jnp.zeros_like(keep), folded_gradient(Folded(*sums), packed=packs)


def flops(sizes: Sizes, folded: Folded) -> int:
    """Of the matrix products and the attention of one sentence, forward."""
    return 2 * sizes.words * (sum(matrix.size for matrix in folded) + 2 * sizes.words * sizes.channels)


_inner_block.defvjp(_forward_saving, _backward)
