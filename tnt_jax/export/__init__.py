"""A model for those who do not have this code."""

from tnt_jax.export.files import SUFFIXES, Exported, description_path, export_model, load_export
from tnt_jax.export.web import export_web

__all__ = ["SUFFIXES", "Exported", "description_path", "export_model", "export_web", "load_export"]
