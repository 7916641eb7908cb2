"""The inner transformer, which relates the words of one patch: one set of parameters, one interface.

A block calls it and knows nothing of how it is computed.
"""

from jaxtyping import Array, Float, PRNGKeyArray

from tnt_jax.models.layers import TransformerLayer


class InnerTransformer(TransformerLayer):
    """Equations 6 and 7 of the paper: a transformer layer on the words of each patch, all patches of all images side by
    side.

    The words of a patch are one row, so stochastic depth drops a branch per patch, as the published code does.
    """

    def __call__(
        self, words: Float[Array, "sentences words inner"], key: PRNGKeyArray | None = None
    ) -> Float[Array, "sentences words inner"]:
        return super().__call__(words, key)
