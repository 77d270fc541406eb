"""Model checkpoints on disk."""

from __future__ import annotations

from .folder import Checkpoint, cast_matrices, load_folder, locate, save_folder, shipped

__all__ = ["Checkpoint", "cast_matrices", "load_folder", "locate", "save_folder", "shipped"]
