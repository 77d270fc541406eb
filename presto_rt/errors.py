"""Typed errors. Every message is one line that names the fault, the value and the remedy.

The command line prints the message and exits with status 1. Each class also derives from the built-in exception of the
same kind, so that callers may catch either.
"""

from __future__ import annotations


class PrestoError(Exception):
    """Base class of every error that Presto-RT raises on purpose."""


class InvalidInputError(PrestoError, ValueError):
    """An argument has the wrong type, is out of range, or names something unknown."""


class WeightsError(PrestoError):
    """A weights folder is missing, incomplete, damaged, or belongs to another model."""


class BackendUnavailableError(PrestoError, RuntimeError):
    """A device or backend was requested by name and is not available on this machine."""


class OutputError(PrestoError, OSError):
    """The result cannot be written to the requested path."""


class MissingDependencyError(PrestoError, ImportError):
    """An optional package is required for the request and is not installed."""


class OutOfMemoryError(PrestoError, MemoryError):
    """The memory for a request was not available, even after all caches were released. The model remains usable."""


class GenerationError(PrestoError, ArithmeticError):
    """The sampler diverged: the latents hold NaN or infinity although the request was valid."""
