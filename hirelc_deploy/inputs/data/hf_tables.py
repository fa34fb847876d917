"""In: a folder with Arrow or Parquet files of Hugging Face. Out: the cells of each split, read when they are needed."""

from __future__ import annotations

import bisect
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from hirelc_deploy.errors import InputError
from hirelc_deploy.inputs.data.pictures import files_in
from hirelc_deploy.inputs.data.text_files import read_json, split_called


class Table(Protocol):
    """Rows of one file."""

    file: Path
    columns: list[str]
    features: dict[str, Any]
    """Column to what the data set's own description says of it; empty where there is none."""

    def __len__(self) -> int: ...

    def cell(self, column: str, row: int) -> Any:
        """Return a value in Python's own types."""


def hf_tables(folder: Path) -> dict[str, list[Table]]:
    """Return the tables of each split, in order; raises InputError where there are none, or pyarrow is not there."""
    try:
        importlib.import_module("pyarrow")
    except ImportError:
        raise InputError(
            f"{folder}: pyarrow is needed to read it; install it with pip install 'hirelc-deploy[hfdata]'."
        ) from None
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; hfdata: names what save_to_disk wrote, or a folder of Parquet files."
        )
    found: dict[str, list[Table]] = {}
    for split, file in _files(folder):
        found.setdefault(split, []).append(_opened(file))
    if not found:
        raise InputError(f"{folder}: neither state.json nor a .parquet file is in it; name the folder of save_to_disk.")
    columns = next(iter(found.values()))[0].columns
    for table in (table for tables in found.values() for table in tables):
        if missing := sorted(set(columns) - set(table.columns)):
            raise InputError(f"{table.file}: has no column {missing[0]!r}, as the first file has; add it.")
    return found


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield split and file; what names no split is train."""
    saved = [state.parent for state in sorted([*folder.glob("state.json"), *folder.glob("*/state.json")])]
    for place in saved:
        listed = read_json(place / "state.json")
        names = [entry.get("filename") for entry in listed.get("_data_files", [])] if isinstance(listed, dict) else []
        if not names or not all(isinstance(name, str) for name in names):
            raise InputError(f"{place / 'state.json'}: names no data files; save the data set again.")
        yield from ((_split(place, folder), place / name) for name in names)
    if not saved:
        files = [file for file in files_in(folder) if file.suffix == ".parquet"]
        splits = {file: split_called(file.stem.split("-")[0]) for file in files}
        for file, split in splits.items():
            if split is None and (named := [other for other in files if splits[other] and other.parent == file.parent]):
                raise InputError(f"{file}: names no split, as {named[0].name} does; call it train, validation or test.")
            yield split or _split(file.parent, folder), file


def _split(place: Path, folder: Path) -> str:
    if place == folder or place.name == "data":
        return "train"
    split = split_called(place.name)
    if split is None:
        raise InputError(f"{place}: names no split; call it train, validation or test.")
    return split


def _opened(file: Path) -> Table:
    arrow = importlib.import_module("pyarrow")
    try:
        return _ParquetTable(file) if file.suffix == ".parquet" else _ArrowTable(file)
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; save the data set again.") from None
    except (arrow.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{file}: not readable as an Arrow or Parquet file ({reason:.120}); save it again.") from None


def _features(schema: Any) -> dict[str, Any]:
    try:
        described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        return dict(described["info"]["features"])
    except (KeyError, TypeError, ValueError):
        return {}


class _ArrowTable:
    """A stream of record batches, mapped into memory."""

    def __init__(self, file: Path) -> None:
        arrow = importlib.import_module("pyarrow")
        self.file = file
        with arrow.memory_map(str(file)) as mapped:
            self._table = arrow.ipc.open_stream(mapped).read_all()
        self.columns, self.features = list(self._table.schema.names), _features(self._table.schema)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def cell(self, column: str, row: int) -> Any:
        return self._table[column][row].as_py()


class _ParquetTable:
    """Groups of rows, of which the last one that was asked for is kept for each column."""

    def __init__(self, file: Path) -> None:
        parquet = importlib.import_module("pyarrow.parquet")
        self.file, self._file = file, parquet.ParquetFile(file, memory_map=True)
        groups = range(self._file.metadata.num_row_groups)
        self._starts = [0]
        for group in groups:
            self._starts.append(self._starts[-1] + self._file.metadata.row_group(group).num_rows)
        schema = self._file.schema_arrow
        self.columns, self.features = list(schema.names), _features(schema)
        self._kept: dict[str, tuple[int, Any]] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    def cell(self, column: str, row: int) -> Any:
        group = bisect.bisect_right(self._starts, row) - 1
        if self._kept.get(column, (-1, None))[0] != group:
            self._kept[column] = group, self._file.read_row_group(group, columns=[column])[column]
        return self._kept[column][1][row - self._starts[group]].as_py()
