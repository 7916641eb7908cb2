"""A model for those who do not have this code."""

from tnt_jax.export.files import SUFFIXES, Exported, description_path, export_model, load_export

__all__ = ["SUFFIXES", "Exported", "description_path", "export_model", "load_export"]
