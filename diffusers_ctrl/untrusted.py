"""Reading files that a stranger may have written: JSON and safetensors, within bounds that are checked before anything is allocated.

Every function raises ValueError, naming the file, for whatever is wrong with it; a pickle or a program is never read.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


MAX_JSON_BYTES = 8 * 2**20
MAX_JSON_DEPTH = 40
MAX_HEADER_BYTES = 32 * 2**20
MAX_TENSOR_BYTES = 8 * 2**30
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def shorten(value: Any, length: int = 200) -> str:
    """`repr(value)` for an error message: a stranger's text must not flood the terminal, nor send it escape sequences."""
    return clip(repr(value), length)


def clip(text: str, length: int = 300) -> str:
    return text if len(text) <= length else f"{text[:length]}…"


def is_number(value: Any) -> bool:
    """Whether a value from JSON is a finite number that fits a float."""
    return type(value) in (int, float) and -1e30 < value < 1e30


def hub_cache(folder: Path) -> Path | None:
    """The repository's folder in the Hub's cache, if `folder` is one of its snapshots (which link to its blobs) or inside one."""
    return next((parent.parent for parent in folder.resolve().parents if parent.name == "snapshots"), None)


def member(folder: Path, name: str) -> Path:
    """`folder`/`name`, a regular file that really lies in the folder (or, for a folder of the Hub's cache, in the cache of that repository).

    Raises:
        ValueError: if there is no such file, or it is something else, or a link leads out of the folder.
    """
    path = folder / name
    if not path.is_file():
        raise ValueError(f"The adapter has no {path.name} in {path.parent}.")
    home, target, cache = folder.resolve(), path.resolve(), hub_cache(folder)
    if not target.is_relative_to(home) and not (cache is not None and target.is_relative_to(cache / "blobs")):
        raise ValueError(f"{path} is a link that leads out of the adapter's folder: only files inside it are read.")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError naming the file."""
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; more than {MAX_JSON_BYTES:,} are not read.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of thousands of digits, thousands of brackets
        raise ValueError(f"{path} is not valid JSON: {clip(str(error))}.") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(data).__name__}.")
    level: list[Any] = [data]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            item
            for value in level
            for item in (value.values() if isinstance(value, dict) else value)
            if isinstance(item, (dict, list))
        ]
    if level:
        raise ValueError(f"{path} is not valid JSON here: it is nested more than {MAX_JSON_DEPTH} levels deep.")
    return data


def check_header(path: Path) -> None:
    """Checks the header of a safetensors file against the file's size: types, shapes, and that the tensors fill the body exactly.

    Raises:
        ValueError: naming the file and the tensor.
    """
    broken = f"{path} is truncated or not a safetensors file"
    size = path.stat().st_size
    if size > MAX_TENSOR_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; more than {MAX_TENSOR_BYTES:,} are not read.")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8 or length > MAX_HEADER_BYTES:
            raise ValueError(f"{broken}: it has {size:,} bytes and a header of {length:,}.")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{broken}: its header is not valid JSON.") from error
    if not isinstance(header, dict):
        raise ValueError(f"{broken}: its header is no JSON object.")
    header.pop("__metadata__", None)
    spans = []
    for key, spec in header.items():
        if not isinstance(spec, dict) or set(spec) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{broken}: the entry of tensor {shorten(key)} is malformed.")
        dtype, shape, offsets = spec["dtype"], spec["shape"], spec["data_offsets"]
        if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
            raise ValueError(
                f"{path} holds a tensor {shorten(key)} that is not finite floating point: its type is {shorten(dtype)}."
            )
        # an empty tensor costs nothing in the file, but may have a side of any length
        if not isinstance(shape, list) or len(shape) > 8 or not all(type(n) is int and 0 < n <= size for n in shape):
            raise ValueError(f"{path} holds a tensor {shorten(key)} of the impossible shape {shorten(shape)}.")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and 0 <= n <= size for n in offsets):
            raise ValueError(f"{broken}: tensor {shorten(key)} has the offsets {shorten(offsets)}.")
        if math.prod(shape) * ITEM_BYTES[dtype] != offsets[1] - offsets[0]:
            raise ValueError(f"{broken}: tensor {shorten(key)} has {offsets[1] - offsets[0]:,} bytes for the shape {shape}.")
        spans.append(offsets)
    end = 0
    for first, last in sorted(spans):
        if first != end:
            raise ValueError(f"{broken}: its tensors overlap or leave gaps.")
        end = last
    if end != size - 8 - length:
        raise ValueError(f"{broken}: its tensors need {end:,} bytes, and it has {size - 8 - length:,}.")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors, in float32. Raises ValueError naming the file; see `check_header`."""
    check_header(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {clip(str(error))}.") from error
    tensors = {key: value.float() for key, value in tensors.items()}
    for key, value in tensors.items():
        if not torch.isfinite(value).all():  # float64 beyond float32's range included
            raise ValueError(f"{path} holds a tensor {shorten(key)} that is not finite floating point.")
    return tensors
