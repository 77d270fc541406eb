"""Audio clips, files, 16-bit conversion and resampling."""

from __future__ import annotations

from .clip import Audio, check_writable, load

__all__ = ["Audio", "check_writable", "load"]
