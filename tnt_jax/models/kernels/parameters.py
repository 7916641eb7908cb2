"""The parameters of an inner transformer layer, as the kernels of every platform take them."""

from typing import NamedTuple

from jaxtyping import Array


class LayerParameters(NamedTuple):
    """In float32. A kernel's gradient has the same names.

    TPUs take them transposed: vectors as columns (n, 1), and matrices (outputs, inputs), which multiply from the left.
    CPUs take them as the modules hold them: vectors (n,), and matrices (inputs, outputs).
    """

    norm1_scale: Array  # channels, or channels of all words
    norm1_bias: Array
    qkv: Array  # channels to 3 * channels
    proj: Array
    proj_bias: Array
    norm2_scale: Array
    norm2_bias: Array
    fc1: Array  # channels to hidden
    fc1_bias: Array
    fc2: Array
    fc2_bias: Array
