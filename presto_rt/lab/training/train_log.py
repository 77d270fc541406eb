"""Training logs: one CSV row per interval, and TensorBoard where it is installed."""

from __future__ import annotations

import contextlib
import csv
from pathlib import Path
from typing import Any, TextIO


class TrainLog:
    """Append scalars to `folder`/log.csv, and to TensorBoard if it is installed.

    The first row fixes the columns. A resumed run appends under the same header and drops the rows after `from_step`,
    its checkpoint's step, so that no step occurs twice.
    """

    def __init__(self, folder: str | Path, from_step: int = 0) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "log.csv"
        self._columns: list[str] = []
        if self.path.is_file():
            self._drop_rows_after(from_step)
        self._handle: TextIO = open(self.path, "a", newline="", encoding="utf-8")  # noqa: SIM115
        self._board: Any = None
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=from_step or None)

    def _drop_rows_after(self, step: int) -> None:
        with open(self.path, newline="", encoding="utf-8") as handle:
            rows = list(csv.reader(handle))
        if not rows or step <= 0:
            self.path.unlink()
            return
        self._columns = rows[0]
        kept = [row for row in rows[1:] if len(row) == len(rows[0]) and int(row[0]) <= step]
        temporary = self.path.with_name("log.csv.tmp")  # a kill during the rewrite must not lose the log
        with open(temporary, "w", newline="", encoding="utf-8") as handle:
            csv.writer(handle).writerows([rows[0], *kept])
        temporary.replace(self.path)

    def write(self, step: int, **scalars: float) -> None:
        """Append one row. Later rows may omit columns; columns that the first row lacks are dropped."""
        row = {"step": step, **scalars}
        if not self._columns:
            self._columns = list(row)
            csv.DictWriter(self._handle, self._columns).writeheader()
        writer: csv.DictWriter[str] = csv.DictWriter(self._handle, self._columns, extrasaction="ignore")
        writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
        self._handle.flush()
        if self._board is not None:
            for key, value in scalars.items():
                self._board.add_scalar(key, value, step)

    def close(self) -> None:
        """Flush and close the files."""
        self._handle.close()
        if self._board is not None:
            self._board.close()
