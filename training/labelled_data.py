"""Reads a labelled image dataset, whoever made it: a folder with metadata.jsonl, a parquet file (or a folder of them), or a Hub id."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image


@dataclass(frozen=True)
class LabelledImages:
    """images: (N, 3, S, S) in [0, 1]. labels: (N,) int64 indices into `names`."""

    images: torch.Tensor
    labels: torch.Tensor
    names: tuple[str, ...]


def open_dataset(name: str, split: str = "train") -> datasets.Dataset:
    """Opens a dataset by path or Hub id. Raises ValueError if there is nothing that `datasets` can read."""
    path = Path(name)
    try:
        if path.is_file() and path.suffix == ".parquet":
            return datasets.load_dataset("parquet", data_files=str(path), split="train")
        if path.is_dir():
            files = sorted(str(file) for file in path.rglob("*.parquet"))
            if files:
                return datasets.load_dataset("parquet", data_files=files, split="train")
            return datasets.load_dataset("imagefolder", data_dir=str(path), split=split)
        return datasets.load_dataset(name, split=split)
    except (FileNotFoundError, ConnectionError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"Dataset {name!r} could not be opened: it must be a folder with images and metadata.jsonl, a parquet file, or a Hub "
            f"dataset id ({type(error).__name__}: {str(error).strip().splitlines()[0]})."
        ) from error


def _picture(cell: dict, row: int, size: int) -> np.ndarray:
    """Decodes one image cell to (size, size, 3) uint8. Raises ValueError naming the image."""
    where = f"row {row}" + (f" ({cell['path']})" if isinstance(cell, dict) and cell.get("path") else "")
    try:
        source = io.BytesIO(cell["bytes"]) if cell.get("bytes") is not None else cell["path"]
        with Image.open(source) as picture:
            picture = picture.convert("RGB")
            if picture.size != (size, size):
                side = min(picture.size)
                left, top = (picture.width - side) // 2, (picture.height - side) // 2
                picture = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
            return np.asarray(picture)
    except Exception as error:  # what a broken file makes PIL raise is open-ended, decompression bombs included
        raise ValueError(f"The image in {where} cannot be read: {error}.") from error


def load_labelled_images(
    name: str,
    size: int,
    *,
    image_column: str = "image",
    label_column: str = "label",
    label_names: Sequence[str] | None = None,
    max_rows: int | None = None,
    skip_unreadable: bool = False,
) -> LabelledImages:
    """Loads images and class labels.

    Args:
        size: images are centre-cropped to a square and resized to this many pixels a side.
        label_names: the classes in order; the column's ClassLabel names (or its sorted values) by default.
        skip_unreadable: leave out images that cannot be read, with a warning that names them, instead of stopping.

    Raises:
        ValueError: for a missing column, a class that `label_names` lacks, or an unreadable image; the message names it.
    """
    table = open_dataset(name)
    for column, argument in ((image_column, "--image_column"), (label_column, "--label_column")):
        if column not in table.column_names:
            raise ValueError(f"Dataset {name!r} has no column {column!r}; it has {table.column_names}. Name it with {argument}.")
    if max_rows is not None:
        table = table.select(range(min(max_rows, len(table))))
    feature = table.features[label_column]
    values = table[label_column][:]
    if isinstance(feature, datasets.ClassLabel):
        # -1 is how `datasets` writes "no label"
        values = [feature.names[v] if v is not None and 0 <= v < len(feature.names) else v for v in values]
        own_names = tuple(feature.names)
    else:
        own_names = tuple(str(value) for value in sorted({value for value in values if value is not None}))
    names = tuple(label_names or own_names)
    for row, value in enumerate(values):
        if value is None or str(value) not in names:
            raise ValueError(f"Row {row} of dataset {name!r} has label {value!r}, which is not one of {list(names)}.")
    cells = table.cast_column(image_column, datasets.Image(decode=False))[image_column]
    pictures, labels, skipped = [], [], []
    for row, (cell, value) in enumerate(zip(cells, values, strict=True)):
        try:
            pictures.append(_picture(cell, row, size))
        except ValueError as error:
            if not skip_unreadable:
                raise ValueError(f"Dataset {name!r}: {error} Pass --skip_unreadable true to leave such images out.") from error
            skipped.append(str(error))
            continue
        labels.append(names.index(str(value)))
    if skipped:
        warnings.warn(f"Dataset {name!r}: {len(skipped)} images were skipped. {' '.join(skipped[:5])}", stacklevel=2)
    if not pictures:
        raise ValueError(f"Dataset {name!r} has no readable image.")
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    return LabelledImages(images, torch.tensor(labels), names)
