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
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from tnt_jax.models.kernels.parameters import LayerParameters
from tnt_jax.models.kernels.tpu.tile import (
    LANES,
    SUBLANES,
    TILE,
    PerSentence,
    Sizes,
    blocks_of_word,
    channel_of_word,
    channels_of_word,
    dot,
    gelu_and_derivative,
    is_sentence,
    normalise_columns,
    over_tiles,
    start_sums,
    through_norm,
    total,
    with_matrices_in,
)


def norm1(sizes: Sizes, layer: LayerParameters, x_ref, blocks: list) -> tuple[list, list]:
    """Per group: (normed, scale) of the first norm, and its result for a matrix product."""
    parts = [normalise_columns(x_ref[block], sizes.epsilon) for block in blocks]
    out = [normed * layer.norm1_scale[...] + layer.norm1_bias[...] for normed, _ in parts]
    return parts, [h.astype(sizes.dtype) for h in out]


def project_qkv(sizes: Sizes, layer: LayerParameters, x_ref, qkv_ref) -> None:
    """Writes q, scaled by 1 / sqrt(head_dim), k and v of all words, as registers of one channel."""
    channels = sizes.channels

    def of_word(word, _):
        _, hs = norm1(sizes, layer, x_ref, blocks_of_word(sizes, word))
        for group, h in enumerate(hs):
            qkv = dot(layer.qkv[...], h)
            qkv_ref[channels_of_word(sizes, 0, channels, word, group), :] = qkv[:channels] * sizes.head_dim**-0.5
            qkv_ref[channels_of_word(sizes, channels, 2 * channels, word, group), :] = qkv[channels:]
        return 0

    lax.fori_loop(0, sizes.words, of_word, 0)


class Head:
    """Registers of one head of attention: [channel] of the current word, (channel, word) of the others."""

    def __init__(self, sizes: Sizes, head: int, qkv_ref):
        self.sizes, self.first, self.qkv_ref = sizes, head * sizes.head_dim, qkv_ref

    def current(self, ref, word: Array) -> list[Array]:
        """This head's channels of a word in an array that has as many channels as the layer."""
        return [ref[channel_of_word(self.sizes, self.first + d, word), :] for d in range(self.sizes.head_dim)]

    def write(self, ref, word: Array, values: list[Array]) -> None:
        for d, value in enumerate(values):
            ref[channel_of_word(self.sizes, self.first + d, word), :] = value

    def key(self, d: int, word: int) -> Array:
        return self.qkv_ref[channel_of_word(self.sizes, self.sizes.channels + self.first + d, word), :]

    def value(self, d: int, word: int) -> Array:
        return self.qkv_ref[channel_of_word(self.sizes, 2 * self.sizes.channels + self.first + d, word), :]

    def weights(self, query: list[Array]) -> tuple[list[Array], Array]:
        """Exponentials of the scores against every word, and one over their sum."""
        words = range(self.sizes.words)
        scores = [total([q * self.key(d, j) for d, q in enumerate(query)]) for j in words]
        highest = functools.reduce(jnp.maximum, scores)
        exponentials = [jnp.exp(score - highest) for score in scores]
        return exponentials, 1 / total(exponentials)


def for_all_words_and_heads(sizes: Sizes, qkv_ref, visit) -> None:
    for index in range(sizes.heads):
        head = Head(sizes, index, qkv_ref)
        lax.fori_loop(0, sizes.words, lambda word, _, head=head: visit(head, word) or 0, 0)


def forward_kernel(sizes: Sizes, saves: bool, x_ref, keep_ref, *refs) -> None:
    """`keep_ref` (2, sentences): what the residual branch of attention and that of the MLP are multiplied by."""
    layer, refs = LayerParameters(*refs[: len(LayerParameters._fields)]), refs[len(LayerParameters._fields) :]
    y_ref, *attended_ref = refs[: 1 + saves]
    x32_ref, qkv_ref, *attended32_ref = refs[1 + saves :]
    x32_ref[...] = x_ref[...].astype(jnp.float32)
    project_qkv(sizes, layer, x32_ref, qkv_ref)

    def attend(head: Head, word) -> None:
        exponentials, scale = head.weights(head.current(qkv_ref, word))
        mixed = [total([e * head.value(d, j) for j, e in enumerate(exponentials)]) for d in range(sizes.head_dim)]
        # The query has done its part: its place takes what it found.
        head.write(qkv_ref, word, [value * scale for value in mixed])

    for_all_words_and_heads(sizes, qkv_ref, attend)

    def rest_of_word(word, _):
        # Each step for all groups before the next one: their chains run side by side.
        blocks = blocks_of_word(sizes, word)
        attended = [qkv_ref[channels_of_word(sizes, 0, sizes.channels, word, group), :] for group in range(SUBLANES)]
        if saves:
            for block, value in zip(blocks, attended, strict=True):
                attended32_ref[0][block] = value
        *_, x, z = to_hidden(sizes, layer, x32_ref, keep_ref, blocks, attended)
        hidden = [gelu_and_derivative(z, exact=sizes.dtype == jnp.float32)[0].astype(sizes.dtype) for z in z]
        out = [dot(layer.fc2[...], hidden) + layer.fc2_bias[...] for hidden in hidden]
        for block, before, change in zip(blocks, x, out, strict=True):
            x32_ref[block] = before + change * keep_ref[1:2, block[1]]
        return 0

    lax.fori_loop(0, sizes.words, rest_of_word, 0)
    y_ref[...] = x32_ref[...].astype(y_ref.dtype)
    if saves:
        attended_ref[0][...] = attended32_ref[0][...].astype(sizes.dtype)


def to_hidden(sizes: Sizes, layer: LayerParameters, x_ref, keep_ref, blocks: list, attended: list) -> tuple[list, ...]:
    """From what attention found to the hidden channels of the MLP, per group of sentences.

    Returns: `attended` for matrix products, (normed, scale) and result of the second norm, the words after attention,
    the hidden channels before GELU.
    """
    attended = [value.astype(sizes.dtype) for value in attended]
    out = [dot(layer.proj[...], value) + layer.proj_bias[...] for value in attended]
    x = [x_ref[block] + out * keep_ref[0:1, block[1]] for block, out in zip(blocks, out, strict=True)]
    parts = [normalise_columns(x, sizes.epsilon) for x in x]
    h = [(normed * layer.norm2_scale[...] + layer.norm2_bias[...]).astype(sizes.dtype) for normed, _ in parts]
    return attended, parts, h, x, [dot(layer.fc1[...], h) + layer.fc1_bias[...] for h in h]


def backward_kernel(sizes: Sizes, sentences: int, x_ref, keep_ref, attended_ref, dy_ref, *refs) -> None:
    """Gradients of the words and, summed over the tiles, of the parameters; those of vectors with 128 partial sums."""
    count = len(LayerParameters._fields)
    layer, dx_ref, gradients, scratch = LayerParameters(*refs[:count]), refs[count], refs[count + 1 : -6], refs[-6:]
    gradients = LayerParameters(*gradients)
    x32_ref, dx32_ref, attended32_ref, qkv_ref, dattended_ref, dkv_ref = scratch
    channels, exact = sizes.channels, sizes.dtype == jnp.float32

    start_sums(gradients)
    there = is_sentence(sentences)
    for whole, ref in ((x32_ref, x_ref), (dx32_ref, dy_ref), (attended32_ref, attended_ref)):
        whole[...] = jnp.where(there, ref[...].astype(jnp.float32), 0)
    keep_ref[...] = jnp.where(there, keep_ref[...], 0)
    dkv_ref[...] = jnp.zeros(dkv_ref.shape, jnp.float32)
    project_qkv(sizes, layer, x32_ref, qkv_ref)

    def add_products(name: str, rows: list, columns: list) -> None:
        rows = [value.astype(sizes.dtype) for value in rows]
        getattr(gradients, name)[...] += total([dot(*pair, (1, 1)) for pair in zip(rows, columns, strict=True)])

    def through_mlp(word, _):
        blocks = blocks_of_word(sizes, word)
        attended = [attended32_ref[block] for block in blocks]
        attended, parts, h, _, z = to_hidden(sizes, layer, x32_ref, keep_ref, blocks, attended)
        activated = [gelu_and_derivative(z, exact=exact) for z in z]
        dy = [dx32_ref[block] for block in blocks]
        dout = [dy * keep_ref[1:2, block[1]] for dy, block in zip(dy, blocks, strict=True)]
        gradients.fc2_bias[...] += total(dout)
        add_products("fc2", dout, [hidden.astype(sizes.dtype) for hidden, _ in activated])
        dhidden = [dot(layer.fc2[...], dout.astype(sizes.dtype), (0, 0)) for dout in dout]
        dz = [dhidden * derivative for dhidden, (_, derivative) in zip(dhidden, activated, strict=True)]
        gradients.fc1_bias[...] += total(dz)
        add_products("fc1", dz, h)
        dh = [dot(layer.fc1[...], dz.astype(sizes.dtype), (0, 0)) for dz in dz]
        dx = through_norm(dh, parts, layer.norm2_scale, gradients.norm2_scale, gradients.norm2_bias)
        dx = [dy + dx for dy, dx in zip(dy, dx, strict=True)]
        dout = [dx * keep_ref[0:1, block[1]] for dx, block in zip(dx, blocks, strict=True)]
        gradients.proj_bias[...] += total(dout)
        add_products("proj", dout, attended)
        for group, (block, new, change) in enumerate(zip(blocks, dx, dout, strict=True)):
            dx32_ref[block] = new
            dattended = dot(layer.proj[...], change.astype(sizes.dtype), (0, 0))
            dattended_ref[channels_of_word(sizes, 0, channels, word, group), :] = dattended
        return 0

    lax.fori_loop(0, sizes.words, through_mlp, 0)

    def through_attention(head: Head, word) -> None:
        words, dims = range(sizes.words), range(sizes.head_dim)
        query, dout = head.current(qkv_ref, word), head.current(dattended_ref, word)
        exponentials, scale = head.weights(query)
        weights = [e * scale for e in exponentials]
        dweights = [total([dout[d] * head.value(d, j) for d in dims]) for j in words]
        along = total([w * dw for w, dw in zip(weights, dweights, strict=True)])
        dscores = [w * (dw - along) for w, dw in zip(weights, dweights, strict=True)]
        dquery = [total([dscores[j] * head.key(d, j) for j in words]) * sizes.head_dim**-0.5 for d in dims]
        for j in words:
            for d in dims:
                dkv_ref[channel_of_word(sizes, head.first + d, j), :] += dscores[j] * query[d]
                dkv_ref[channel_of_word(sizes, channels + head.first + d, j), :] += weights[j] * dout[d]
        head.write(qkv_ref, word, dquery)

    for_all_words_and_heads(sizes, qkv_ref, through_attention)

    def through_qkv(word, _):
        blocks = blocks_of_word(sizes, word)
        parts, h = norm1(sizes, layer, x32_ref, blocks)
        dq = [qkv_ref[channels_of_word(sizes, 0, channels, word, group), :] for group in range(SUBLANES)]
        dkv = [dkv_ref[channels_of_word(sizes, 0, 2 * channels, word, group), :] for group in range(SUBLANES)]
        dqkv = [jnp.concatenate(pair) for pair in zip(dq, dkv, strict=True)]
        add_products("qkv", dqkv, h)
        dh = [dot(layer.qkv[...], dqkv.astype(sizes.dtype), (0, 0)) for dqkv in dqkv]
        dx = through_norm(dh, parts, layer.norm1_scale, gradients.norm1_scale, gradients.norm1_bias)
        for block, change in zip(blocks, dx, strict=True):
            dx32_ref[block] += change
        return 0

    lax.fori_loop(0, sizes.words, through_qkv, 0)
    dx_ref[...] = dx32_ref[...].astype(dx_ref.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def inner_block(
    sizes: Sizes,
    interpret: bool,
    words: Float[Array, "flat sentences"],
    keep: Float[Array, "2 sentences"],
    layer: LayerParameters,
) -> Float[Array, "flat sentences"]:
    """A transformer layer over the words of every sentence.

    `keep` is what each sentence's branch of attention and of the MLP is multiplied by: 1, or what stochastic depth has
    drawn. It has no gradient. `interpret` runs the kernels step by step on any platform, for tests.
    """
    (out,) = _forward(sizes, interpret, words, keep, layer, saves=False)
    return out


# Jitted, so that a network of many blocks traces each kernel, and turns it into a program, once.
@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="saves")
def _forward(sizes: Sizes, interpret: bool, words, keep, layer: LayerParameters, *, saves: bool) -> list[Array]:
    rows, sentences = words.shape
    results = [PerSentence(jax.ShapeDtypeStruct(words.shape, words.dtype))]
    scratch = [(rows, TILE), (3 * sizes.channels * sizes.pitch, LANES)]
    if saves:
        results.append(PerSentence(jax.ShapeDtypeStruct(words.shape, sizes.dtype)))
        scratch.append((rows, TILE))
    return over_tiles(
        "inner_block_forward",
        functools.partial(forward_kernel, sizes, saves),
        [PerSentence(words), PerSentence(keep)],
        with_matrices_in(sizes.dtype, layer),
        results,
        scratch=scratch,
        flops=sentences * flops(sizes, layer),
        interpret=interpret,
    )


def _forward_saving(sizes: Sizes, interpret: bool, words, keep, layer: LayerParameters):
    out, attended = _forward(sizes, interpret, words, keep, layer, saves=True)
    return out, (words, keep, attended, layer)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _backward(sizes: Sizes, interpret: bool, saved, gradient):
    words, keep, attended, layer = saved
    rows, sentences = words.shape
    registers = sizes.channels * sizes.pitch
    dwords, *dlayer = over_tiles(
        "inner_block_backward",
        functools.partial(backward_kernel, sizes, sentences),
        [PerSentence(array) for array in (words, keep, attended, gradient)],
        with_matrices_in(sizes.dtype, layer),
        [PerSentence(jax.ShapeDtypeStruct(words.shape, words.dtype))],
        sums=True,
        scratch=[*[(rows, TILE)] * 3, (3 * registers, LANES), (registers, LANES), (2 * registers, LANES)],
        flops=3 * sentences * flops(sizes, layer),
        interpret=interpret,
    )
    return dwords, jnp.zeros_like(keep), LayerParameters(*dlayer)


def flops(sizes: Sizes, layer: LayerParameters) -> int:
    """Of the matrix products and the attention of one sentence, forward."""
    of_a_word = sum(matrix.size for matrix in (layer.qkv, layer.proj, layer.fc1, layer.fc2))
    return 2 * sizes.words * (of_a_word + 2 * sizes.words * sizes.channels)


inner_block.defvjp(_forward_saving, _backward)
