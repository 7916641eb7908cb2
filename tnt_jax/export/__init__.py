"""Self-contained exports of a model."""

from tnt_jax.export.files import Exported, description_path, export_model, load_export
from tnt_jax.export.formats import FORMATS
from tnt_jax.export.web import export_web

__all__ = ["FORMATS", "Exported", "description_path", "export_model", "export_web", "load_export"]
