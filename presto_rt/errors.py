"""Typed errors. Every message is one line and says what to do; the command line prints it and exits non-zero."""

from __future__ import annotations


class PrestoError(Exception):
    """Base class of every error that Presto-RT raises on purpose."""


class InvalidInputError(PrestoError, ValueError):
    """An argument is of the wrong type, out of range, or names something unknown."""


class WeightsError(PrestoError):
    """A weights folder is missing, incomplete, damaged, or of another model."""


class BackendUnavailableError(PrestoError, RuntimeError):
    """A device or backend was asked for by name and cannot be had here."""


class OutputError(PrestoError, OSError):
    """The result cannot be written where it was asked to go."""


class MissingDependencyError(PrestoError, ImportError):
    """An optional package is needed for this and is not installed."""


class OutOfMemoryError(PrestoError, MemoryError):
    """The engine found no memory for a request, even after it gave up all that it kept. It can be used on."""
