"""Trainers of the codec and the base model."""
