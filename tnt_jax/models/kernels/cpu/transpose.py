"""A matrix with rows and columns exchanged on CPUs: transpose.c."""

import jax
from jaxtyping import Array, BFloat16

from tnt_jax.models.kernels.cpu import library


def transpose(x: BFloat16[Array, "rows columns"]) -> BFloat16[Array, "columns rows"]:
    """x^T as an array of its own, which XLA does not fold into the product that takes it."""
    return library.call("transpose", jax.ShapeDtypeStruct(x.shape[::-1], x.dtype), x)
