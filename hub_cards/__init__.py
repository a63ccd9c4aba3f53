"""Publishing of MoCa models: export to one folder that transformers and sentence-transformers load by name."""

from .card import validate_card, write_card, write_training_card
from .export import export, export_model

__all__ = ["export", "export_model", "validate_card", "write_card", "write_training_card"]
