"""Audio clips, files, 16-bit conversion and resampling."""

from __future__ import annotations

from .clip import Audio, load
from .files import check_writable

__all__ = ["Audio", "check_writable", "load"]
