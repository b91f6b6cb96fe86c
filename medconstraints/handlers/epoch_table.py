"""A table with one row for each epoch, which a resumed run continues."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["EpochTable"]

logger = logging.getLogger(__name__)


class EpochTable:
    """CSV file with one row for each epoch; a column that comes later is empty in the rows before.

    The file is written whole beside itself and renamed: a run killed while it writes leaves the former one. A run that
    was resumed writes epochs again that the killed one had written: their rows, and all later ones, are cut. A new run
    that finds the table of another one renames it, `<name>.old1`, `.old2`, ...

    Args:
        path: the file, such as `output/constraints.csv`; its folder is made.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def write(self, epoch: int, values: Mapping[str, float | None]) -> None:
        """Add the row of an epoch, in place of the rows of this and later epochs.

        Args:
            epoch: number of the epoch.
            values: column -> number; None leaves the cell empty.

        Raises:
            RuntimeError: the file exists and has other columns besides, or is no such table; it stays as it is.
        """
        rows = self._rows_before(epoch, [*values])
        if not rows and self._has_text():
            # Nothing of the file is kept: it belongs to another run, unless that was killed in its first epoch.
            self._set_aside()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(self.path.name + ".part")
        with beside.open("w", encoding="utf-8", newline="") as file:
            columns = dict.fromkeys(["epoch", *(rows[0] if rows else ()), *values])
            writer = csv.DictWriter(file, [*columns], restval="", lineterminator="\n")
            writer.writeheader()
            row = {name: None if value is None else float(value) for name, value in values.items()}
            writer.writerows([*rows, {"epoch": epoch, **row}])
        os.replace(beside, self.path)

    def _has_text(self) -> bool:
        return self.path.exists() and self.path.stat().st_size > 0

    def _set_aside(self) -> None:
        number = 1
        while (other := self.path.with_name(f"{self.path.name}.old{number}")).exists():
            number += 1
        os.replace(self.path, other)
        logger.warning("%s was of another run: it is now %s", self.path.name, other.name)

    def _rows_before(self, epoch: int, columns: Sequence[str]) -> list[dict[str, str]]:
        if not self._has_text():
            return []
        with self.path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows, found = [*reader], [*(reader.fieldnames or ())]
        others = sorted(set(found) - {"epoch", *columns})
        if others or found[:1] != ["epoch"]:
            raise RuntimeError(
                f"{self.path.name}: its columns are those of another run ({others} besides); choose another file, or "
                "move this one away."
            )
        try:
            return [row for row in rows if int(row["epoch"]) < epoch]
        except (TypeError, ValueError) as error:
            raise RuntimeError(
                f"{self.path.name}: expected the number of an epoch at the start of each row ({error}); move it away."
            ) from error
