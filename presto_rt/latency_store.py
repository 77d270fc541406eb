"""Tables of measured costs in the user's cache folder, one file for each model, backend and machine."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from .deadline import CostRow, LatencyTable

log = logging.getLogger("presto_rt")


class LatencyStore:
    """The table of one fingerprint, below $XDG_CACHE_HOME or ~/.cache.

    fingerprint: everything that timings depend on: weights, versions, device, backend, precision, threads.
    """

    def __init__(self, fingerprint: Mapping[str, str | int]) -> None:
        self.fingerprint = dict(fingerprint)

    @property
    def path(self) -> Path:
        """The table's file."""
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        name = hashlib.sha256(json.dumps(self.fingerprint, sort_keys=True).encode()).hexdigest()[:16]
        return base / "presto-rt" / f"tune-{name}.json"

    def load(self) -> LatencyTable:
        """Return the table; an empty one where its file is missing or not readable as a table."""
        try:
            return LatencyTable().merged(CostRow(**row) for row in json.loads(self.path.read_text())["rows"])
        except (OSError, ValueError, KeyError, TypeError):
            return LatencyTable()

    def save(self, table: LatencyTable) -> bool:
        """Write the table whole or not at all; returns False, with a warning logged, where that fails."""
        text = json.dumps({"key": self.fingerprint, "rows": [asdict(row) for row in table.rows]}, indent=1) + "\n"
        part = self.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(text)
            part.replace(self.path)
        except OSError as error:
            log.warning("the table of timings cannot be kept in %s (%s)", self.path.parent, error.strerror)
            return False
        return True
