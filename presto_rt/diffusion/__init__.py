"""Preconditioners, noise schedules, samplers and guidance: pure functions around a denoiser."""
