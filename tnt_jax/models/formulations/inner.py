"""The ways to compute the inner transformer layer. Words are few and narrow, so the fastest depends on the machine.

- `reference`: the equations as the paper has them, (sentences, words, channels).
- `native`: the whole layer as one function in C for CPUs, kernels/cpu/inner_layer.c.
- `feature_major`: sentences on the last axis, which fills the registers of TPUs; attention is elementwise. On GPUs XLA
  estimates it at 1.4 times the cost of the equations.
- `pallas`: the whole layer in one TPU kernel, kernels/tpu/inner_block.py.
- `cuda`: the whole layer in one kernel for NVIDIA GPUs, kernels/gpu/inner_layer.h. It has not run on a GPU yet, so
  `auto` takes the equations there, and `cuda` is asked for by name.

Where a platform or a size does not allow one, `pallas` falls back to `feature_major` and the others to `reference`.
docs/performance.md and docs/gpus.md say what each costs.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tnt_jax.chips import shared_memory
from tnt_jax.models.formulations.devices import (
    device_kind,
    gpu,
    mesh_obstacle,
    on_each_device,
    platform,
    say_once,
    tpu,
)
from tnt_jax.models.functions import NORM_EPSILON, Keys, gelu, survivors_of_branches
from tnt_jax.models.kernels.gpu.sizes import LEAST_CAPABILITY, LayerSizes, sizes_obstacle
from tnt_jax.models.kernels.parameters import LayerParameters

SMALL_VMEM = ("TPU v2", "TPU v3", "TPU v4")
Kernel = Callable[..., Array]


def inner_kernel(layer: nnx.Module, shape: tuple[int, int, int], *, training: bool) -> Kernel | None:
    """The function of words and a key that computes an `InnerTransformer`; None where its equations do."""
    formulation = choose_inner(layer, *shape[:2], training=training)
    return None if formulation == "reference" else functools.partial(_run, formulation, layer)


def _run(
    formulation: str, layer: nnx.Module, words: Float[Array, "sentences words inner"], key: Keys | None, _: None = None
) -> Float[Array, "sentences words inner"]:
    count, num_words, channels = words.shape
    survival = survivors_of_branches(count, layer.drop_path_rate, key)
    if formulation in ("native", "cuda"):
        return {"native": native, "cuda": cuda}[formulation](layer, words, survival)
    run = {"feature_major": feature_major, "pallas": inner_pallas}[formulation]
    # Transposing moves nothing: XLA gives the words the layout that the formulation wants.
    return run(layer, words.reshape(count, -1).T, survival).T.reshape(count, num_words, channels)


def preferred(asked: str) -> str:
    """The formulation that was asked for; for `auto`, the fastest of this platform."""
    if asked != "auto":
        return asked
    return {"tpu": "pallas", "cpu": "native"}.get(platform(), "reference")


def choose_inner(layer: nnx.Module, sentences: int, num_words: int, *, training: bool) -> str:
    """The formulation that a layer runs: the one that was asked for, if platform and sizes allow it."""
    asked = preferred(layer.formulation)
    if asked != "reference" and (foreign := layer.foreign_part()):
        say_once(f"inner transformers are computed as reference, the equations in XLA: {foreign}")
        return "reference"
    if asked == "pallas" and (obstacle := pallas_obstacle(sentences) or _size_obstacle(layer, num_words)):
        say_once(f"inner transformers are computed as feature_major: {obstacle}")
        asked = "feature_major"
    obstacle = None
    if asked == "native":
        from tnt_jax.models.kernels.cpu import library

        obstacle = library.obstacle("inner_layer", layer.dtype, sentences)
    if asked == "cuda":
        obstacle = cuda_obstacle(layer, sentences, num_words)
    if asked != "reference" and training and layer.has_dropout:
        obstacle = obstacle or f"{asked} has no dropout"
    if obstacle:
        say_once(f"inner transformers are computed as reference, the equations in XLA: {obstacle}")
    return "reference" if obstacle else asked


def pallas_obstacle(sentences: int) -> str | None:
    """The reason why no Pallas kernel can run on so many sentences here, or None."""
    if platform() != "tpu":
        return f"the Pallas kernel runs on TPUs, and this is a {platform()}"
    if device_kind() in SMALL_VMEM:
        return f"the Pallas kernel takes more VMEM than the 16 MiB of a {device_kind()}"
    return mesh_obstacle(sentences)


def _size_obstacle(layer: nnx.Module, num_words: int) -> str | None:
    """The reason why the Pallas kernel cannot run this layer, or None."""
    from tnt_jax.models.kernels.tpu.tile import SUBLANES, covers_layer

    if not covers_layer(num_words, layer.attn.qkv.in_features, layer.attn.num_heads):
        return f"the Pallas kernel takes channels in multiples of {SUBLANES}, and words in pairs"
    if not layer.norms_each_token:
        return "the Pallas kernel normalises each word by itself"
    return None


def cuda_card_obstacle(dtype: DTypeLike) -> str | None:
    """The reason why no CUDA kernel can run in this dtype here, or None."""
    if platform() != "gpu":
        return f"the CUDA kernel runs on NVIDIA GPUs, and this is a {platform()}"
    card = gpu()
    if isinstance(card, str):
        return card
    if card[0] < LEAST_CAPABILITY:
        return f"the CUDA kernel needs compute capability {LEAST_CAPABILITY}, and this card has {card[0]}"
    return None if dtype == "bfloat16" else f"the CUDA kernel computes in bfloat16, and this is {dtype}"


def cuda_obstacle(layer: nnx.Module, sentences: int, num_words: int) -> str | None:
    """The reason why the CUDA kernels cannot run this layer on so many sentences here, or None."""
    if obstacle := cuda_card_obstacle(layer.dtype):
        return obstacle
    if not layer.norms_each_token:
        return "the CUDA kernel normalises each word by itself"
    from tnt_jax.models.kernels.gpu import call, folding

    sizes = cuda_sizes(layer, num_words)
    if obstacle := sizes_obstacle(sizes):
        return obstacle
    wanted, most = max(folding.shared_bytes(sizes).values()) / 2**10, shared_memory(gpu()[0]) / 2**10
    if wanted > most:
        return f"the CUDA kernel needs {wanted:.0f} KiB of shared memory, and a block of this card has {most:.0f}"
    return mesh_obstacle(sentences) or call.means(sizes).obstacle


def columns(layer: nnx.Module) -> LayerParameters:
    """The parameters of a layer as columns, and matrices that multiply from the left."""
    norm1, attn, norm2, mlp = layer.norm1, layer.attn, layer.norm2, layer.mlp

    def matrix(linear: nnx.Linear) -> Array:
        return linear.kernel[...].T.astype(jnp.float32)

    def column(vector: nnx.Param) -> Array:
        return vector[...].astype(jnp.float32)[:, None]

    return LayerParameters(
        column(norm1.scale), column(norm1.bias), matrix(attn.qkv), matrix(attn.proj), column(attn.proj.bias),
        column(norm2.scale), column(norm2.bias), matrix(mlp.fc1), column(mlp.fc1.bias), matrix(mlp.fc2),
        column(mlp.fc2.bias),
    )  # fmt: skip


def as_held(layer: nnx.Module) -> LayerParameters:
    """The parameters of a layer as its modules hold them."""
    norm1, attn, norm2, mlp = layer.norm1, layer.attn, layer.norm2, layer.mlp
    parameters = LayerParameters(
        norm1.scale, norm1.bias, attn.qkv.kernel, attn.proj.kernel, attn.proj.bias,
        norm2.scale, norm2.bias, mlp.fc1.kernel, mlp.fc1.bias, mlp.fc2.kernel, mlp.fc2.bias,
    )  # fmt: skip
    return LayerParameters(*(each[...].astype(jnp.float32) for each in parameters))


def native(
    layer: nnx.Module, words: Float[Array, "sentences words channels"], survival: Float[Array, "2 sentences"]
) -> Float[Array, "sentences words channels"]:
    """The layer as one function in C; on a mesh, each device runs it on its own sentences."""
    from tnt_jax.models.kernels.cpu.inner_layer import inner_layer

    kernel = functools.partial(inner_layer, layer.attn.num_heads, NORM_EPSILON)
    return on_each_device(kernel, (0, 1, None), 0)(words, survival, as_held(layer))


def cuda_sizes(layer: nnx.Module, num_words: int) -> LayerSizes:
    """The sizes that the CUDA kernels are compiled for."""
    channels, hidden = layer.attn.qkv.in_features, layer.mlp.fc1.out_features
    return LayerSizes(num_words, channels, layer.attn.num_heads, hidden, NORM_EPSILON)


def cuda(
    layer: nnx.Module,
    words: Float[Array, "sentences words channels"],
    survival: Float[Array, "2 sentences"],
    multiprocessors: int | None = None,
) -> Float[Array, "sentences words channels"]:
    """The layer in one kernel on NVIDIA GPUs; on a mesh, each device runs it on its own sentences.

    Args:
        multiprocessors: of a card; by default of the one that is traced for.
    """
    from tnt_jax.models.kernels.gpu.inner_layer import inner_layer

    kernel = functools.partial(inner_layer, cuda_sizes(layer, words.shape[1]), multiprocessors or gpu()[1])
    return on_each_device(kernel, (0, 1, None), 0)(words, survival, as_held(layer))


def inner_pallas(
    layer: nnx.Module,
    words: Float[Array, "rows sentences"],
    survival: Float[Array, "2 sentences"],
    *,
    interpret: bool = False,
) -> Float[Array, "rows sentences"]:
    """The layer in one kernel; on a mesh, each device runs it on its own sentences. `interpret` runs it anywhere."""
    from tnt_jax.models.kernels.tpu.inner_block import inner_block
    from tnt_jax.models.kernels.tpu.tile import Sizes

    channels = layer.attn.qkv.in_features
    sizes = Sizes(words.shape[0] // channels, channels, layer.attn.num_heads, NORM_EPSILON, layer.dtype)
    kernel = functools.partial(inner_block, sizes, tpu(interpret=interpret))
    return on_each_device(kernel, (1, 1, None), 1)(words, survival, columns(layer))


def feature_major(
    layer: nnx.Module, words: Float[Array, "rows sentences"], survival: Float[Array, "2 sentences"]
) -> Float[Array, "rows sentences"]:
    """The layer with sentences on the last axis: no axis of 24 channels or 16 words is left to be padded."""
    p, dtype, heads = columns(layer), layer.dtype, layer.attn.num_heads
    channels = layer.attn.qkv.in_features
    axes = (1,) if layer.norms_each_token else (0, 1)
    x = words.reshape(-1, channels, words.shape[-1]).astype(jnp.float32)

    def norm(x: Array, scale: Array, bias: Array) -> Float[Array, "words channels sentences"]:
        centred = x - x.mean(axes, keepdims=True)
        normed = centred * jax.lax.rsqrt((centred * centred).mean(axes, keepdims=True) + NORM_EPSILON)
        # A norm has as many parameters as the words and channels that it looks at.
        return normed * scale.reshape(-1, channels, 1) + bias.reshape(-1, channels, 1)

    def linear(matrix: Array, x: Array) -> Float[Array, "words outputs sentences"]:
        matrix, x = matrix.astype(dtype), x.astype(dtype)
        return jnp.einsum("oc,wcn->won", matrix, x, preferred_element_type=jnp.float32)

    def attention(h: Array) -> Float[Array, "words channels sentences"]:
        qkv = linear(p.qkv, h).astype(dtype).reshape(h.shape[0], 3, heads, -1, h.shape[-1])
        query, key, value = (qkv[:, part].astype(jnp.float32) for part in range(3))
        scores = (query[:, None] * key[None]).sum(3) * query.shape[2] ** -0.5  # (queries, keys, heads, sentences)
        weights = jax.nn.softmax(scores, axis=1)
        return (weights[:, :, :, None] * value[None]).sum(1).reshape(h.shape)

    x = x + (linear(p.proj, attention(norm(x, p.norm1_scale, p.norm1_bias))) + p.proj_bias) * survival[0]
    hidden = gelu(linear(p.fc1, norm(x, p.norm2_scale, p.norm2_bias)) + p.fc1_bias)
    x = x + (linear(p.fc2, hidden) + p.fc2_bias) * survival[1]
    return x.reshape(words.shape).astype(words.dtype)
