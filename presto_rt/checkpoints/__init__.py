"""Checkpoints on disk and the models that they describe."""
