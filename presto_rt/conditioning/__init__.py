"""Prompts, tempos and keys as inputs of a network."""
