"""Evaluation metrics: distances between sets of clips, and adherence of clips to their captions."""
