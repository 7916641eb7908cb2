"""The inner transformer, which relates the words of one patch."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tnt_jax.config import ModelConfig
from tnt_jax.models.formulations.inner import transform_words
from tnt_jax.models.functions import Keys, split_key, survivors
from tnt_jax.models.layers import LayerNorm, Rngs, TransformerLayer


class InnerTransformer(TransformerLayer):
    """Equations 6 and 7 of the paper: a transformer layer on the words of each patch, all patches of all images side by
    side.

    The words of a patch are one row, so stochastic depth drops a branch per patch, as the published code does.
    How it is computed is chosen in formulations/inner.py.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        drop_path_rate: float,
        *,
        norm: Callable[..., nnx.Module] = LayerNorm,
        config: ModelConfig,
        rngs: Rngs,
    ):
        super().__init__(dim, num_heads, drop_path_rate, norm=norm, config=config, rngs=rngs)
        self.formulation = config.inner
        self.dtype = jnp.dtype(config.dtype)
        self.has_dropout = bool(config.drop_rate or config.attn_drop_rate)

    def __call__(
        self, words: Float[Array, "sentences words inner"], key: Keys | None = None
    ) -> Float[Array, "sentences words inner"]:
        return transform_words(self, words, key)

    def reference(
        self, words: Float[Array, "sentences words inner"], key: Keys | None = None
    ) -> Float[Array, "sentences words inner"]:
        """The equations as the paper has them."""
        return super().reference(words, key)

    def branch_survival(self, sentences: int, key: Keys | None) -> Float[Array, "2 sentences"]:
        """The factors of stochastic depth for the two branches of each sentence, drawn as `reference` draws them."""
        _, attn_key, _, mlp_key = split_key(key, 4)
        return jnp.stack([survivors(sentences, self.drop_path_rate, each) for each in (attn_key, mlp_key)])
