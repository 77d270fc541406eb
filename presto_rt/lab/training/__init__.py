"""Trainers of the codec and the base model, and packing of their weights."""
