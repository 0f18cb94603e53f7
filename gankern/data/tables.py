"""Tables of numbers: standardised, each column to mean 0 and standard deviation 1; and CSV files."""

from __future__ import annotations

import array
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np
import torch

from gankern import checks
from gankern.data.dataset import OP, Dataset, Table

MOST_COLUMNS = 1 << 16
MOST_CHARACTERS = 1 << 22  # of a line


def standardised(values: np.ndarray, columns: Sequence[str], path: Path, note: str) -> Dataset:
    """The rows of `values` [N, F] as float32 samples, with what restores them. A column of one value has the s.d. 0."""
    values = values.astype(np.float64)
    if values.size == 0:
        checks.fail(ValueError, OP, "table", "have at least one row and one column", f"shape {list(values.shape)} in {path}")
    row, column = (int(i[0]) if len(i) else -1 for i in np.nonzero(~np.isfinite(values)))
    if row >= 0:
        checks.fail(ValueError, OP, f"column {columns[column]}", "hold finite numbers", f"{values[row, column]} in {path}")
    spread = np.ptp(values, 0) > 0.0
    mean, std = np.where(spread, values.mean(0), values[0]), np.where(spread, values.std(0), 0.0)
    samples = torch.from_numpy(((values - mean) / np.where(spread, std, 1.0)).astype(np.float32))
    table = Table(tuple(columns), tuple(mean.tolist()), tuple(std.tolist()))
    return Dataset(samples, name=path.stem, note=f"{note}, columns standardised", table=table)


def read_csv(path: Path, limit: int | None) -> Dataset:
    """Comma-separated numbers, under a line of names unless all of the first line are numbers; blank lines are passed over."""
    values = array.array("d")
    columns: list[str] = []
    count = 0
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(_lines(file, path))
            for row in reader:
                if not row:
                    continue
                if len(row) > MOST_COLUMNS:
                    wanted = f"have at most {MOST_COLUMNS} columns"
                    checks.fail(ValueError, OP, "table", wanted, f"{len(row)} in line {reader.line_num} of {path}")
                if not columns:
                    named = not all(map(_is_number, row))
                    columns = row if named else [f"x{i + 1}" for i in range(len(row))]
                    if named:
                        continue
                if len(row) != len(columns):
                    wanted = f"have {len(columns)} entries in each line"
                    checks.fail(ValueError, OP, "table", wanted, f"{len(row)} in line {reader.line_num} of {path}")
                try:
                    values.extend(map(float, row))
                except ValueError:
                    name, entry = next((name, entry) for name, entry in zip(columns, row, strict=True) if not _is_number(entry))
                    where = f"{entry!r} in line {reader.line_num} of {path}"
                    checks.fail(ValueError, OP, f"column {name}", "hold numbers", where)
                count += 1
                if count == limit:
                    break
    except (UnicodeDecodeError, csv.Error) as error:
        checks.fail(ValueError, OP, "source", "be a CSV file in UTF-8", f"{path}: {error}")
    return standardised(np.array(values).reshape(count, len(columns)), columns, path, f"CSV of {count} rows")


def _lines(file: TextIO, path: Path) -> Iterator[str]:
    """A line that has no end is no reason to read the whole file as one."""
    while line := file.readline(MOST_CHARACTERS):
        if len(line) == MOST_CHARACTERS:
            checks.fail(ValueError, OP, "table", f"have lines of less than {MOST_CHARACTERS} characters", f"a longer one in {path}")
        yield line


def _is_number(entry: str) -> bool:
    try:
        float(entry)
    except ValueError:
        return False
    return True
