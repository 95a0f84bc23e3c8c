"""Reads a labelled image dataset, whoever made it: a folder with metadata.jsonl, a parquet file (or a folder of them), or a Hub id."""

from __future__ import annotations

import io
import json
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps


MANIFEST = "manifest.json"  # beside the shards that sampled_data writes
KINDS = ("categorical", "continuous")
CHUNK = 32  # images that are in memory at full size at a time


@dataclass(frozen=True)
class LabelledImages:
    """Images with the labels of one column, or of several.

    images: (N, 3, S, S) in [0, 1], or what `transform` made of it.
    labels: (N,) for one column, (N, A) for a list of A columns. Class indices into `names`, or numbers. int64 for one categorical
        column in which every row has a label; float32 otherwise, with NaN where a row has none.
    names: the classes of one column, () if it is continuous; for a list of columns one such tuple a column.
    """

    images: torch.Tensor
    labels: torch.Tensor
    names: tuple[str, ...] | tuple[tuple[str, ...], ...]


def shard_paths(folder: str | os.PathLike, count: int) -> list[Path]:
    """The parquet files of a dataset of `count` shards."""
    return [Path(folder) / f"train-{i:05d}-of-{count:05d}.parquet" for i in range(count)]


def open_dataset(name: str, split: str = "train", *, streaming: bool = False) -> datasets.Dataset | datasets.IterableDataset:
    """Opens a dataset by path or Hub id; as an `IterableDataset`, of which nothing is read yet, with `streaming`.

    Raises:
        ValueError: if there is nothing that `datasets` can read, or a dataset that was not written to its end.
    """
    path = Path(name)
    if (path / MANIFEST).is_file():
        try:
            count = int(json.loads((path / MANIFEST).read_text())["shards"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path / MANIFEST} cannot be read ({error}): write the dataset again.") from error
        shards = shard_paths(path, count)
        if absent := [shard.name for shard in shards if not shard.is_file()]:
            raise ValueError(
                f"Dataset {name!r} is not complete: {len(absent)} of its {count} shards are missing, first {absent[0]}. Run what "
                "wrote it again with the same settings: it goes on where it stopped."
            )
        # `datasets` fails at a file without rows, which a shard is whose images were all unreadable
        files = [str(shard) for shard in shards if pq.read_metadata(shard).num_rows]
        if not files:
            raise ValueError(f"Dataset {name!r} has no readable image.")
        return datasets.load_dataset("parquet", data_files=files, split="train", streaming=streaming)
    try:
        if path.is_file() and path.suffix == ".parquet":
            return datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=streaming)
        if path.is_dir():
            files = sorted(str(file) for file in path.rglob("*.parquet"))
            if files:
                return datasets.load_dataset("parquet", data_files=files, split="train", streaming=streaming)
            return datasets.load_dataset("imagefolder", data_dir=str(path), split=split, streaming=streaming)
        return datasets.load_dataset(name, split=split, streaming=streaming)
    except (FileNotFoundError, ConnectionError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"Dataset {name!r} could not be opened: it must be a folder with images and metadata.jsonl, a parquet file, or a Hub "
            f"dataset id ({type(error).__name__}: {str(error).strip().splitlines()[0]})."
        ) from error


def _as_seen(picture: Image.Image) -> Image.Image:
    """An opened picture as a viewer shows it, RGB. Raises ValueError for grey values of which nobody knows where white is."""
    sixteen = picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM"))
    if picture.mode in ("I", "F") and not sixteen:
        raise ValueError(f"its grey values ({picture.format}, mode {picture.mode}) have no known white; save it with 8 or 16 bits")
    picture = ImageOps.exif_transpose(picture)  # a camera stores what it saw, and beside it which way is up
    if sixteen:  # convert() would cut off all above 255
        picture = Image.fromarray(((np.asarray(picture).astype(np.int32) + 128) // 257).astype(np.uint8))
    return picture.convert("RGB")


def read_picture(source: io.BytesIO | str | os.PathLike, where: str, size: int) -> np.ndarray:
    """Decodes one image, upright, centre-cropped to a square and resized: (size, size, 3) uint8. Raises ValueError naming `where`."""
    try:
        with Image.open(source) as picture:
            picture = _as_seen(picture)
            if picture.size != (size, size):
                side = min(picture.size)
                left, top = (picture.width - side) // 2, (picture.height - side) // 2
                picture = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
            return np.asarray(picture)
    except Exception as error:  # what a broken file makes PIL raise is open-ended, decompression bombs included
        raise ValueError(f"The image in {where} cannot be read: {error}.") from error


def decode_cell(cell: dict | None, where: str, size: int) -> np.ndarray:
    """The picture of an image column's cell, see `read_picture`. Raises ValueError naming `where` and the file."""
    where += f" ({cell['path']})" if isinstance(cell, dict) and cell.get("path") else ""
    if cell is None:
        raise ValueError(f"The image in {where} cannot be read: the cell is empty.")
    return read_picture(io.BytesIO(cell["bytes"]) if cell.get("bytes") is not None else cell["path"], where, size)


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def check_columns(dataset: str, present: Sequence[str], image_column: str, label_columns: Sequence[str]) -> None:
    """Raises ValueError naming the first column that is not there, and the argument to give."""
    for column, argument in ((image_column, "--image_column"), *((column, "--label_column") for column in label_columns)):
        if column not in present:
            raise ValueError(f"Dataset {dataset!r} has no column {column!r}; it has {list(present)}. Name it with {argument}.")


@dataclass(frozen=True)
class LabelReader:
    """What the values of a label column mean.

    feature: of the column, as `datasets` knows it. names: its classes in order, None where they are not known yet.
    """

    dataset: str
    column: str
    kind: str
    feature: Any
    names: tuple[str, ...] | None = None
    allow_missing: bool = False

    def __post_init__(self) -> None:
        names = self.names
        if self.kind == "categorical" and not names and self.is_class:
            names = self.feature.names
        object.__setattr__(self, "names", tuple(names) if names and self.kind == "categorical" else None)

    @property
    def is_class(self) -> bool:
        return self.kind == "categorical" and isinstance(self.feature, datasets.ClassLabel)

    def number(self, value: Any, where: str) -> float:
        """The value as a class index or a number, NaN for no label. Raises ValueError naming `where`."""
        if self.is_class and value is not None and 0 <= value < len(self.feature.names):
            value = self.feature.names[value]
        # -1 is how `datasets` writes "no label"
        if self.allow_missing and (_is_missing(value) or (self.is_class and value == -1)):
            return math.nan
        wrong = f"{where.capitalize()} of dataset {self.dataset!r} has label {value!r}, which is not"
        if self.kind == "categorical":
            names = self.names or ()
            if value is None or str(value) not in names:
                raise ValueError(f"{wrong} one of {list(names)}, in column {self.column!r}.")
            return float(names.index(str(value)))
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise ValueError(f"{wrong} a finite number, in column {self.column!r}.")
        return float(value)


def _read_labels(
    table: datasets.Dataset, dataset: str, column: str, kind: str, label_names: Sequence[str] | None, allow_missing: bool
) -> tuple[list[float], tuple[str, ...]]:
    """A column's labels as numbers, NaN where there is none, and its classes. Raises ValueError naming the row."""
    values = table[column][:]
    reader = LabelReader(dataset, column, kind, table.features[column], label_names, allow_missing)
    if kind == "categorical" and reader.names is None:
        found = sorted({value for value in values if not _is_missing(value)})
        reader = replace(reader, names=tuple(str(value) for value in found))
    labels = [reader.number(value, f"row {row}") for row, value in enumerate(values)]
    return labels, reader.names or ()


def prepared(pictures: Sequence[np.ndarray], transform: Callable[[torch.Tensor], torch.Tensor] | None) -> torch.Tensor:
    """(S, S, 3) uint8 pictures as images (n, 3, S, S) in [0, 1], or what `transform` makes of up to 32 of them at a time."""
    parts = []
    for first in range(0, len(pictures), CHUNK):
        part = torch.from_numpy(np.stack(pictures[first : first + CHUNK])).permute(0, 3, 1, 2).float().div_(255)
        parts.append(part if transform is None else transform(part))
    return torch.cat(parts)


def load_labelled_images(
    name: str,
    size: int,
    *,
    image_column: str = "image",
    label_column: str | Sequence[str] = "label",
    label_names: Sequence[str] | Sequence[Sequence[str] | None] | None = None,
    kind: str | Sequence[str] = "categorical",
    allow_missing: bool = False,
    max_rows: int | None = None,
    skip_unreadable: bool = False,
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> LabelledImages:
    """Loads images and labels.

    Args:
        size: images are centre-cropped to a square and resized to this many pixels a side.
        label_column: a column, or a list of them: one an attribute.
        label_names: the classes in order; the column's ClassLabel names (or its sorted values) by default. For a list of columns
            one list (or None) a column.
        kind: "categorical" or "continuous" (numbers); for a list of columns one for all, or one a column.
        allow_missing: a row without a label (None, NaN, or -1 in a ClassLabel column) gives NaN instead of an error.
        skip_unreadable: leave out images that cannot be read, with a warning that names them, instead of stopping.
        transform: images (n, 3, S, S) in [0, 1] -> (n, …), called on up to 32 of them at a time, so that large images need not be
            in memory together: the autoencoder's round trip and the resizing to the classifier's size, for instance.

    Raises:
        ValueError: for a missing column, a class that `label_names` lacks, a label that is no number in a continuous column, or an
            unreadable image; the message names it.
    """
    several = not isinstance(label_column, str)
    columns = list(label_column) if several else [label_column]
    name_lists = list(label_names or [None] * len(columns)) if several else [label_names]
    kinds = [kind] * len(columns) if isinstance(kind, str) else list(kind)
    if not len(columns) == len(name_lists) == len(kinds) or not columns:
        raise ValueError(
            f"{len(columns)} label columns need as many label_names and kinds; got {len(name_lists)} and {len(kinds)} for {columns}."
        )
    if unknown := [k for k in kinds if k not in KINDS]:
        raise ValueError(f"kind must be one of {list(KINDS)}, got {unknown[0]!r}.")

    table = open_dataset(name)
    check_columns(name, table.column_names, image_column, columns)
    if max_rows is not None:
        table = table.select(range(min(max_rows, len(table))))
    read = [_read_labels(table, name, column, k, n, allow_missing) for column, k, n in zip(columns, kinds, name_lists, strict=True)]
    labels, names = torch.tensor([column for column, _ in read], dtype=torch.float64).T, tuple(n for _, n in read)

    images, kept, skipped, chunk = None, [], [], []
    cells = table.cast_column(image_column, datasets.Image(decode=False))[image_column]
    for row, cell in enumerate(cells):
        try:
            chunk.append(decode_cell(cell, f"row {row}", size))
            kept.append(row)
        except ValueError as error:
            if not skip_unreadable:
                raise ValueError(f"Dataset {name!r}: {error} Pass --skip_unreadable true to leave such images out.") from error
            skipped.append(str(error))
        if chunk and (len(chunk) == CHUNK or row == len(table) - 1):
            part = prepared(chunk, transform)
            if images is None:
                images = torch.empty((len(table), *part.shape[1:]), dtype=part.dtype)
            images[len(kept) - len(chunk) : len(kept)] = part
            chunk = []
    if skipped:
        warnings.warn(f"Dataset {name!r}: {len(skipped)} images were skipped. {' '.join(skipped[:5])}", stacklevel=2)
    if images is None:
        raise ValueError(f"Dataset {name!r} has no readable image.")
    labels = labels[kept].float()
    if not several:
        labels, names = labels[:, 0], names[0]
        if kinds[0] == "categorical" and not allow_missing:
            labels = labels.long()
    return LabelledImages(images[: len(kept)], labels, names)
