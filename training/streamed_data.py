"""Labelled images read row by row while the classifier learns, for datasets that are larger than memory.

Only a head of each dataset is kept: the first rows in a shuffled order. Its rows are dealt out to the classifier's members as
cross-fitting deals out a whole dataset, so that each is predicted by a member that did not learn from it; early stopping and calibration
use these predictions alone. Rows are told apart by their image's bytes, so that a copy of a held-out image elsewhere in the dataset is
not learned from either. All other rows teach every member: with a dataset in memory all of them would serve the calibration, here the
head does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import datasets
import numpy as np
import torch

from labelled_data import LabelledImages, LabelReader, check_columns, decode_cell, open_dataset, prepared


BUFFER = 512  # rows, still encoded, among which the next is drawn; the order of the shards is drawn as well
Row = tuple[bytes, np.ndarray, list[float]]  # digest of the stored image, picture (S, S, 3) uint8, labels


@dataclass(frozen=True)
class LabelledStream:
    """A dataset of which the head is in memory.

    head: the first rows, labels (N, A). keys: a digest of each of their images, as it is stored. rows: (seed, pass, digests) -> every row
    of the dataset once, in an order of its own, but those with one of the digests. transform: of images, see `load_labelled_images`.
    begun: the pass that the head was read from; closing one over several shards makes datasets wait for five seconds, and the start should not.
    """

    head: LabelledImages
    keys: tuple[bytes, ...]
    rows: Callable[[int, int, Set[bytes]], Iterator[Row]]
    transform: Callable[[torch.Tensor], torch.Tensor] | None
    begun: Iterator[Row]

    def batches(self, without: Sequence[int], size: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Endless batches of `size` images and labels, pass after pass, each in another order.

        without: rows of the head that must not come, nor any other row with one of their images. The batches depend on `seed`.

        Raises:
            ValueError: where nothing else is in the dataset.
        """
        held = {self.keys[row] for row in without}

        def allowed() -> Iterator[tuple[np.ndarray, list[float]]]:
            for number in count():
                empty = True
                for _, picture, labels in self.rows(seed, number, held):
                    empty = False
                    yield picture, labels
                if empty:
                    raise ValueError("The dataset has no image besides those that are held out: streaming needs more of them.")

        rows = allowed()
        while True:
            pictures, labels = zip(*islice(rows, size), strict=True)
            yield prepared(pictures, self.transform), torch.tensor(labels, dtype=torch.float32)


def stream_labelled_images(
    name: str,
    size: int,
    *,
    image_column: str = "image",
    label_columns: Sequence[str] = ("label",),
    label_names: Sequence[Sequence[str] | None] = (None,),
    kinds: Sequence[str] = ("categorical",),
    max_rows: int | None = None,
    head: int = 2000,
    seed: int = 0,
    skip_unreadable: bool = False,
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> LabelledStream:
    """Opens a dataset as a stream and reads its head; the other arguments as in `load_labelled_images`.

    Raises:
        ValueError: as `load_labelled_images`, now for the head and later for any other row; for a categorical column whose classes are
            neither given nor the column's own (they cannot be known before the last row).
    """
    table = open_dataset(name, streaming=True)
    check_columns(name, table.column_names, image_column, label_columns)
    readers = [
        LabelReader(name, column, kind, table.features[column], names)
        for column, kind, names in zip(label_columns, kinds, label_names, strict=True)
    ]
    for reader in readers:
        if reader.kind == "categorical" and reader.names is None:
            raise ValueError(
                f"The classes of column {reader.column!r} of dataset {name!r} cannot be known before its last row is read: give --label_names."
            )
    if max_rows is not None:
        table = table.take(max_rows)
    table = table.cast_column(image_column, datasets.Image(decode=False))

    def rows(seed: int, number: int, without: Set[bytes] = frozenset()) -> Iterator[Row]:
        shuffled = table.shuffle(seed=seed, buffer_size=BUFFER)
        shuffled.set_epoch(number)
        for place, row in enumerate(shuffled):
            where = f"row {place} of the stream (seed {seed}, pass {number})"
            cell = row[image_column]
            if cell is not None and (key := _key(cell)) in without:
                continue
            labels = [reader.number(row[reader.column], where) for reader in readers]
            try:
                picture = decode_cell(cell, where, size)
            except ValueError as error:
                if not skip_unreadable:
                    raise ValueError(f"Dataset {name!r}: {error} Pass --skip_unreadable true to leave such images out.") from error
                continue
            yield key, picture, labels

    begun = rows(seed, 0)
    first = list(islice(begun, head))
    if not first:
        raise ValueError(f"Dataset {name!r} has no readable image.")
    keys, pictures, labels = zip(*first, strict=True)
    names = tuple(tuple(reader.names or ()) for reader in readers)
    kept = LabelledImages(prepared(pictures, transform), torch.tensor(labels, dtype=torch.float32), names)
    return LabelledStream(kept, keys, rows, transform, begun)


def _key(cell: dict[str, Any]) -> bytes:
    content = cell["bytes"] if cell.get("bytes") is not None else cell["path"].encode()
    return hashlib.blake2b(content, digest_size=16).digest()
