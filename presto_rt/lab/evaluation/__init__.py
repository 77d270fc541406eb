"""Judges: distances between sets of clips, and agreement with what a caption says."""
