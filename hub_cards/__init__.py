"""Publishing of MoCa models: export to one folder that transformers and sentence-transformers load by name."""

from .export import export, export_model

__all__ = ["export", "export_model"]
