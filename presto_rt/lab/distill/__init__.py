"""Distillation to fewer steps (Presto-S), fewer layers (Presto-L), both (Presto-LS), and their baselines."""
