"""Pictures of what a model does and of how a run went. Each is a function that returns a matplotlib figure."""

from tnt_jax.visualize.attention import class_attention, inner_attention, outer_attention
from tnt_jax.visualize.batch import batch
from tnt_jax.visualize.predictions import confusion, mistakes
from tnt_jax.visualize.runs import curves, schedule
from tnt_jax.visualize.tokens import features, image_tsne, map_tsne, words
from tnt_jax.visualize.why import why

__all__ = [
    "batch",
    "class_attention",
    "confusion",
    "curves",
    "features",
    "image_tsne",
    "inner_attention",
    "map_tsne",
    "mistakes",
    "outer_attention",
    "schedule",
    "why",
    "words",
]
