"""The ways to compute a transformer layer over the tokens of an image.

- `reference`: norm, attention, MLP, each on its own; attention is chosen in attention.py.
- `pallas`: the whole layer in one TPU kernel, kernels/tpu/outer_layer.py.
"""

import functools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tnt_jax.models.formulations.devices import on_each_device, say_once, tpu
from tnt_jax.models.formulations.inner import Kernel, pallas_obstacle, preferred
from tnt_jax.models.functions import NORM_EPSILON, Keys, survivors_of_branches
from tnt_jax.models.kernels.parameters import LayerParameters


def outer_kernel(layer: nnx.Module, shape: tuple[int, int, int], *, has_bias: bool, training: bool) -> Kernel | None:
    """The function of tokens, a key and what is added to the patches that computes a `TransformerLayer`; None where its
    equations do."""
    covered = _is_covered(layer, shape, has_bias=has_bias, training=training)
    return functools.partial(outer_pallas, layer) if covered else None


def add_to_patches(
    tokens: Float[Array, "batch tokens dim"], added: Float[Array, "batch patches dim"]
) -> Float[Array, "batch tokens dim"]:
    """Patches, which are the last tokens, with something added; what stands before them stays what it is."""
    return tokens + jnp.pad(added, ((0, 0), (tokens.shape[1] - added.shape[1], 0), (0, 0)))


def _is_covered(layer: nnx.Module, shape: tuple[int, int, int], *, has_bias: bool, training: bool) -> bool:
    attn, mlp = layer.attn, layer.mlp
    if preferred(getattr(attn, "formulation", "reference")) != "pallas" or pallas_obstacle(shape[0]):
        return False
    if foreign := layer.foreign_part():
        say_once(f"a layer over sentences is computed by the equations in XLA: {foreign}")
        return False
    if has_bias or not attn.one_input or layer.se is not None or not layer.norms_each_token:
        return False
    if training and (attn.drop_rate or attn.attn_drop_rate):
        return False
    from tnt_jax.models.kernels.tpu.outer_layer import covers

    # In float32 XLA rounds the factors of products on TPUs, as kernels do not.
    return attn.qkv.dtype == jnp.bfloat16 and covers(
        shape[1], shape[2], mlp.fc1.out_features, attn.num_heads, attn.qkv.dtype
    )


def outer_pallas(
    layer: nnx.Module,
    x: Float[Array, "batch tokens dim"],
    key: Keys | None,
    added: Float[Array, "batch patches dim"] | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "batch tokens dim"]:
    """The layer in one kernel; on a mesh, each device runs it on its own images. `interpret` runs it anywhere."""
    from tnt_jax.models.kernels.tpu.outer_layer import covers_added, outer_layer

    x = x.astype(layer.attn.qkv.dtype)

    def row(vector: nnx.Param) -> Array:
        return vector[...].astype(jnp.float32)[None]

    def matrix(linear: nnx.Linear) -> Array:
        return linear.kernel[...].astype(jnp.float32)

    norm1, attn, norm2, mlp = layer.norm1, layer.attn, layer.norm2, layer.mlp
    parameters = LayerParameters(
        row(norm1.scale), row(norm1.bias), matrix(attn.qkv), matrix(attn.proj), row(attn.proj.bias),
        row(norm2.scale), row(norm2.bias), matrix(mlp.fc1), row(mlp.fc1.bias), matrix(mlp.fc2), row(mlp.fc2.bias),
    )  # fmt: skip
    survival = survivors_of_branches(x.shape[0], layer.drop_path_rate, key)
    if added is not None and not covers_added(added.shape[1]):
        x, added = add_to_patches(x, added), None
    rows = None if added is None else added.reshape(-1, added.shape[-1])
    kernel = functools.partial(outer_layer, NORM_EPSILON, tpu(interpret=interpret))
    return on_each_device(kernel, (0, 0, 1, None), 0)(x, rows, survival, parameters)
