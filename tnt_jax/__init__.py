"""Transformer in Transformer (TNT) in JAX and Flax: the models, their weights, and their training."""

from tnt_jax.config import InputError
from tnt_jax.inference import inference_model
from tnt_jax.models.summary import summary
from tnt_jax.models.variants import create_model, list_models
from tnt_jax.storage.folder import save_model
from tnt_jax.storage.load import load_model

__all__ = ["InputError", "create_model", "inference_model", "list_models", "load_model", "save_model", "summary"]
