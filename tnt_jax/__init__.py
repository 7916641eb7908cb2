"""Transformer in Transformer (TNT) in JAX and Flax: the models, their weights, and their training."""

from tnt_jax.config import InputError
from tnt_jax.models.summary import summary
from tnt_jax.models.variants import create_model, list_models

__all__ = ["InputError", "create_model", "list_models", "summary"]
