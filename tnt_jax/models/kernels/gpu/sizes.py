"""The sizes that the CUDA kernels are compiled for, and the cards and sizes that they cover."""

from typing import NamedTuple

LEAST_CAPABILITY = 8.0
"""Of a card: tensor cores that multiply bfloat16, the A100's and later."""
KERNELS = ("inner_forward", "inner_mlp_gradient", "inner_attention_gradient")
MOST_WORDS, MOST_CHANNELS, MOST_DIM = 16, 40, 15
MOST_SUMS = 192
"""Of a thread of a gradient. It can have 255 registers, and spills some of them: with fewer sums a TNT-B's words would
take longer to be read, once for each part, than to be computed; with more, what is spilled fits into no first cache."""


class LayerSizes(NamedTuple):
    """Of an inner layer."""

    words: int
    channels: int
    heads: int
    hidden: int
    epsilon: float

    @property
    def dim(self) -> int:
        """Channels of a head."""
        return self.channels // self.heads

    @property
    def padded_dim(self) -> int:
        """Channels of a head in the kernels, at least one more."""
        return 8 if self.dim < 8 else 16

    @property
    def merged(self) -> int:
        """Channels of all heads in the kernels."""
        return self.heads * self.padded_dim

    @property
    def padded(self) -> int:
        """Channels of a word in the kernels, in eights."""
        return -(-self.channels // 8) * 8

    @property
    def normed(self) -> int:
        """Rows of the matrices that multiply normalised words: the channels, a one, padding to sixteens."""
        return (self.channels + 16) // 16 * 16

    @property
    def mlp_parts(self) -> int:
        """In how many parts the gradient's sums over the hidden channels are taken, so that a thread's fit into its
        registers."""
        groups, rows = self.padded // 8, self.normed // 16
        of_eight, of_bias = 4 * rows + 2 * groups, 2 * groups
        if self.hidden // 8 * of_eight + of_bias <= MOST_SUMS:
            return 1
        fit = (MOST_SUMS - of_bias) // (4 * of_eight) * 32  # hidden channels: tiles have 32 rows
        return -(-self.hidden // fit)

    @property
    def hidden_in_parts(self) -> int:
        """Hidden channels as that gradient has them: padded to parts of equal size, in multiples of 32."""
        parts = self.mlp_parts
        return self.hidden if parts == 1 else -(-self.hidden // (32 * parts)) * 32 * parts

    @property
    def attention_parts(self) -> int:
        """The same of the heads."""
        groups = self.merged // 8

        def fits(parts: int) -> bool:
            here = groups // parts
            return 4 * (self.normed // 16 * 3 * here + (here + 1) // 2 * self.padded // 8) <= MOST_SUMS

        possible = [parts for parts in range(1, self.heads + 1) if self.heads % parts == 0 and groups // parts % 2 == 0]
        return next((parts for parts in [1, *possible] if fits(parts)), [1, *possible][-1])

    @property
    def kernels(self) -> tuple[str, ...]:
        return KERNELS

    def macros(self, kernel: str) -> dict[str, object]:
        """The constants that a kernel is compiled with."""
        macros = {"WORDS": self.words, "CHANNELS": self.channels, "HEADS": self.heads, "HIDDEN": self.hidden}
        if kernel == "inner_attention_gradient":
            macros["PARTS"] = self.attention_parts
        if kernel == "inner_mlp_gradient":
            macros |= {"PARTS": self.mlp_parts, "HIDDEN": self.hidden_in_parts}
        return macros | {"EPSILON": f"{self.epsilon}f"}


class Rows(NamedTuple):
    """Of a linear map between norms of whole rows."""

    inputs: int
    width: int
    """Outputs."""
    epsilon: float

    @property
    def kernels(self) -> tuple[str, ...]:
        return ("norm_gradient",)

    def macros(self, kernel: str) -> dict[str, object]:
        """The constants that a kernel is compiled with."""
        return {"INPUTS": self.inputs, "WIDTH": self.width, "EPSILON": f"{self.epsilon}f"}

    @property
    def covered(self) -> bool:
        """True if the kernel takes this width: a lane has two channels of each 64, and registers for ten such."""
        return self.width % 64 == 0 and self.width <= 640


def sizes_obstacle(sizes: LayerSizes) -> str | None:
    """The reason why the kernels cannot run a layer of these sizes, or None."""
    if sizes.words > MOST_WORDS:
        return f"the CUDA kernel takes at most {MOST_WORDS} words a patch, and these are {sizes.words}"
    if sizes.channels % 2 or sizes.channels > MOST_CHANNELS:
        return f"the CUDA kernel takes an even number of channels up to {MOST_CHANNELS}, and these are {sizes.channels}"
    if sizes.dim > MOST_DIM:
        return f"the CUDA kernel takes heads of at most {MOST_DIM} channels, and these have {sizes.dim}"
    if sizes.hidden % 16:
        return f"the CUDA kernel takes hidden channels in multiples of 16, and these are {sizes.hidden}"
    return None
