"""Writes labelled datasets: samples of the base itself, or images in a folder, labelled by Python functions.

A dataset is a folder of parquet shards (train-00000-of-00079.parquet, …) and a manifest.json with the settings it is made with.
Each shard depends on the settings and its own number only, and appears whole or not at all. So a call that was interrupted is
simply repeated, several processes (accelerate) share the shards out, and no more than one shard is in memory.

    python training/sampled_data.py IMAGES OUT --size 512 --labeller compressibility=jpeg_data:jpeg_class \\
        --names 'compressibility=largest|large|small|smallest'
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import reprlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from PIL import Image
from tqdm.auto import tqdm


sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from diffusers_ctrl import processes  # noqa: E402
from diffusers_ctrl.bases import row_arguments  # noqa: E402
from labelled_data import MANIFEST, read_picture, shard_paths  # noqa: E402


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


Labeller = Callable[[torch.Tensor], torch.Tensor]
Rows = dict[str, list]  # column -> values
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Under a temporary name first, so that `path` is whole or not there."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)


def _claim_folder(folder: Path, settings: dict[str, Any], shards: int, state: PartialState) -> None:
    """Writes the manifest, or compares it with these settings: ValueError names what differs."""
    wanted = json.loads(json.dumps({"settings": settings, "shards": shards}, default=str))
    path = folder / MANIFEST
    if path.is_file():
        try:
            found = json.loads(path.read_text())
            before = dict(found["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be read ({error}): remove {folder} to begin again.") from error
        for name in [*wanted["settings"], *(name for name in before if name not in wanted["settings"])]:
            old, new = before.get(name), wanted["settings"].get(name)
            if old != new:
                raise ValueError(
                    f"{folder} holds a dataset made with {name} = {reprlib.repr(old)}, not {reprlib.repr(new)}: write to another "
                    "folder, or remove this one to begin again."
                )
        if found.get("shards") != shards:
            raise ValueError(f"{path} names {found.get('shards')} shards, not {shards}: remove {folder} to begin again.")
    elif folder.is_dir() and (strangers := sorted(folder.rglob("*.parquet"))):
        raise ValueError(f"{folder} already holds {strangers[0].name}, which was not written here: write to another folder.")
    state.wait_for_everyone()  # every process has looked before one writes
    if state.is_main_process and not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _write(path, lambda temporary: temporary.write_text(json.dumps(wanted, indent=2) + "\n"))
    state.wait_for_everyone()


def _write_shards(
    folder: str | os.PathLike,
    count: int,
    shard_size: int,
    settings: dict[str, Any],
    features: datasets.Features,
    batches: Callable[[int, int], Iterator[Rows]],
    description: str,
) -> Path:
    """Writes the shards that are missing. `batches(start, stop)` gives the rows of those items in parts."""
    folder, state = Path(folder), processes.make_state()
    paths = shard_paths(folder, -(-count // shard_size))
    _claim_folder(folder, settings, len(paths), state)
    bar = tqdm(total=count, desc=description, unit="image", disable=not state.is_main_process)
    with processes.together(ValueError):
        for shard, path in enumerate(paths):
            start, stop = shard * shard_size, min((shard + 1) * shard_size, count)
            if shard % state.num_processes == state.process_index and not path.is_file():
                columns: Rows = {name: [] for name in features}
                for rows in batches(start, stop):
                    for name, values in rows.items():
                        columns[name] += values
                table = pa.Table.from_pydict(columns, schema=features.arrow_schema)
                _write(path, lambda temporary, table=table: pq.write_table(table, temporary))
            bar.update(stop - start)
    bar.close()
    return folder


def _label(
    labellers: Mapping[str, Labeller], label_names: Mapping[str, Sequence[str]], pixels: np.ndarray, where: Sequence[str]
) -> Rows:
    """The columns `image` and one an attribute of (n, H, W, 3) uint8 pictures. Raises ValueError naming attribute and picture."""
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    rows: Rows = {"image": []}
    for picture in pixels:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="PNG")
        rows["image"].append({"bytes": buffer.getvalue(), "path": None})
    with torch.no_grad():
        labels = {attribute: torch.as_tensor(labeller(images)).cpu() for attribute, labeller in labellers.items()}
    for attribute, values in labels.items():
        if values.shape != (len(images),):
            raise ValueError(f"The labeller of {attribute!r} gave shape {tuple(values.shape)} for {len(images)} images, not (N,).")
        values, names = values.double(), label_names.get(attribute)
        good = values.isfinite() if names is None else (values == values.round()) & (values >= 0) & (values < len(names))
        if not good.all():
            row = int(good.logical_not().nonzero()[0])
            allowed = "a finite number" if names is None else f"an index into {list(names)}"
            raise ValueError(f"The labeller of {attribute!r} gave {values[row].item()} for {where[row]}, which is not {allowed}.")
        rows[attribute] = values.tolist() if names is None else values.long().tolist()
    return rows


def _features(
    labellers: Mapping[str, Labeller], label_names: Mapping[str, Sequence[str]], text_columns: Sequence[str]
) -> datasets.Features:
    """Columns: image, the text columns, and one an attribute. Raises ValueError for attributes that cannot be columns."""
    if not labellers:
        raise ValueError("labellers must have at least one attribute.")
    if unknown := [attribute for attribute in label_names if attribute not in labellers]:
        raise ValueError(f"label_names has {unknown[0]!r}, which has no labeller; labellers has {list(labellers)}.")
    if taken := [attribute for attribute in labellers if attribute in ("image", *text_columns)]:
        raise ValueError(f"Attribute {taken[0]!r} cannot have the name of another column.")
    columns: dict[str, Any] = {"image": datasets.Image(), **{name: datasets.Value("string") for name in text_columns}}
    for attribute in labellers:
        names = label_names.get(attribute)
        columns[attribute] = datasets.Value("float32") if names is None else datasets.ClassLabel(names=list(names))
    return datasets.Features(columns)


def _described(labellers: Mapping[str, Labeller], label_names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """What the manifest says of the attributes."""
    return {
        "labellers": {a: f"{f.__module__}:{getattr(f, '__qualname__', type(f).__qualname__)}" for a, f in labellers.items()},
        "label_names": {attribute: list(names) for attribute, names in label_names.items()},
    }


def _base_settings(pipe: DiffusionPipeline) -> dict[str, Any]:
    """What the law of the base's samples depends on: pipeline, scheduler, and a digest of the weights."""
    digest = hashlib.sha256()
    for name, component in sorted(pipe.components.items()):
        if isinstance(component, torch.nn.Module) and name != "safety_checker":
            for key, weight in sorted(component.state_dict().items()):
                digest.update(f"{name}.{key}".encode())
                digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    config = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    return {
        "pipeline": type(pipe).__name__,
        "weights": digest.hexdigest(),
        "scheduler": [type(pipe.scheduler).__name__, config],
    }


def write_sampled_dataset(
    folder: str | os.PathLike,
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    labellers: Mapping[str, Labeller],
    label_names: Mapping[str, Sequence[str]],
    num_images: int,
    *,
    batch_size: int = 8,
    shard_size: int = 64,
    seed: int = 0,
    prompt_column: str | None = None,
    **call_kwargs: Any,
) -> Path:
    """Draws `num_images` images of the base and labels them; a call that was interrupted goes on where it stopped.

    Image i has prompt i modulo their number. A safety checker of the pipeline is left out, since it paints images black, which
    training does not do. With several processes each takes every n-th shard.

    Args:
        labellers: a function for each attribute, images (n, 3, H, W) in [0, 1] as they are stored -> (n,) class indices, or numbers.
            The attribute is the column's name.
        label_names: the classes of each attribute that has classes; an attribute without is a number.
        prompt_column: keep the prompts in a column of this name.
        call_kwargs: passed to the pipeline's call (num_inference_steps, guidance_scale, eta, height, …).

    Returns:
        The folder. Columns: image (PNG), the prompt if wanted, and one an attribute.

    Raises:
        ValueError: if the folder holds a dataset of other settings (it names the first that differs); for labels that are not in
            their classes, not finite, or not one an image; for samples with NaN.
    """
    if num_images < 1 or batch_size < 1 or shard_size < 1:
        raise ValueError(f"num_images, batch_size and shard_size must be positive, got {num_images}, {batch_size}, {shard_size}.")
    if not prompts:
        raise ValueError("prompts must not be empty.")
    features = _features(labellers, label_names, [] if prompt_column is None else [prompt_column])
    settings = {
        "source": "samples of the base",
        "num_images": num_images,
        "batch_size": batch_size,
        "shard_size": shard_size,
        "seed": seed,
        "prompts": list(prompts),
        "prompt_column": prompt_column,
        **_described(labellers, label_names),
        "call_kwargs": call_kwargs,
        **_base_settings(pipe),
    }

    def draw(start: int, stop: int) -> Iterator[Rows]:
        for first in range(start, stop, batch_size):
            rows = range(first, min(first + batch_size, stop))
            texts = [prompts[row % len(prompts)] for row in rows]
            generator = torch.Generator().manual_seed(seed * 1_000_003 + first)
            images = np.asarray(pipe(**row_arguments(pipe, texts), generator=generator, output_type="np", **call_kwargs).images)
            if not np.isfinite(images).all():
                raise ValueError(f"The base's samples {first} to {rows[-1]} are not finite; see its scheduler and its precision.")
            pixels = (images * 255).round().astype(np.uint8)
            columns = _label(labellers, label_names, pixels, [f"sample {row}" for row in rows])
            yield columns | ({} if prompt_column is None else {prompt_column: texts})

    checker = getattr(pipe, "safety_checker", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        if checker is not None:
            pipe.safety_checker = None
        return _write_shards(folder, num_images, shard_size, settings, features, draw, "drawing a dataset")
    finally:
        if checker is not None:
            pipe.safety_checker = checker


def label_image_folder(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    labellers: Mapping[str, Labeller],
    label_names: Mapping[str, Sequence[str]],
    size: int,
    *,
    batch_size: int = 16,
    shard_size: int = 256,
    max_images: int | None = None,
    skip_unreadable: bool = False,
) -> Path:
    """Labels the images in `folder` and below, in the order of their paths, and writes them to `out` as a dataset.

    Args:
        labellers, label_names: as in `write_sampled_dataset`.
        size: images are centre-cropped to a square and resized to this many pixels a side, and labelled and stored like that. A
            file-size label means something at one size only: 512 for `jpeg_class`.
        skip_unreadable: leave out images that cannot be read, with a warning that names them, instead of stopping. What was written
            before an unreadable image stopped a call is kept.

    Returns:
        `out`. Columns: image (PNG), file_name (relative to `folder`), and one an attribute.

    Raises:
        ValueError: as `write_sampled_dataset`; for a folder without images; for an image that cannot be read (it names the file).
    """
    source = Path(folder)
    if not source.is_dir():
        raise ValueError(f"{str(folder)!r} is not a folder.")
    if size < 1 or batch_size < 1 or shard_size < 1:
        raise ValueError(f"size, batch_size and shard_size must be positive, got {size}, {batch_size}, {shard_size}.")
    found = (path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
    files = sorted(path.relative_to(source).as_posix() for path in found)[:max_images]
    if not files:
        raise ValueError(f"{str(folder)!r} has no images ({', '.join(sorted(SUFFIXES))}).")
    features = _features(labellers, label_names, ["file_name"])
    settings = {
        "source": "image folder",
        "num_images": len(files),
        "files": hashlib.sha256("\n".join(files).encode()).hexdigest(),
        "size": size,
        "batch_size": batch_size,
        "shard_size": shard_size,
        **_described(labellers, label_names),
    }
    skipped: list[str] = []

    def read(start: int, stop: int) -> Iterator[Rows]:
        for first in range(start, stop, batch_size):
            names, pictures = [], []
            for name in files[first : min(first + batch_size, stop)]:
                try:
                    pictures.append(read_picture(source / name, f"file {name}", size))
                    names.append(name)
                except ValueError as error:
                    if not skip_unreadable:
                        raise ValueError(f"{error} Set skip_unreadable to leave such images out.") from error
                    skipped.append(str(error))
            if pictures:
                yield _label(labellers, label_names, np.stack(pictures), names) | {"file_name": names}

    written = _write_shards(out, len(files), shard_size, settings, features, read, "labelling images")
    skipped = sum(processes.gather_objects(skipped), [])
    if skipped and processes.index() == 0:
        warnings.warn(f"{str(folder)!r}: {len(skipped)} images were skipped. {' '.join(skipped[:5])}", stacklevel=2)
    return written


def main(arguments: list[str] | None = None) -> Path:
    """`label_image_folder` as a command."""
    from task import import_function

    parser = argparse.ArgumentParser(description="Labels the images of a folder and writes them as a dataset.")
    parser.add_argument("folder", help="The images.")
    parser.add_argument("out", help="Where the dataset goes.")
    parser.add_argument("--size", type=int, required=True, help="Pixels a side: images are cropped and resized to this.")
    parser.add_argument("--labeller", action="append", required=True, help="attribute=module:function; may be repeated.")
    parser.add_argument("--names", action="append", default=[], help="attribute=first|second|…, where it has classes.")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_images", type=int, help="Only so many, the first by path.")
    parser.add_argument("--skip_unreadable", action="store_true", help="Leave out images that cannot be read.")
    options = vars(parser.parse_args(arguments))
    pairs = {}
    for option in ("labeller", "names"):
        values = options.pop(option)
        if wrong := [value for value in values if not all(value.partition("="))]:
            raise ValueError(f"--{option} {wrong[0]!r} must be attribute=value.")
        pairs[option] = dict(value.split("=", 1) for value in values)
    labellers = {attribute: import_function(path) for attribute, path in pairs["labeller"].items()}
    names = {attribute: text.split("|") for attribute, text in pairs["names"].items()}
    out = label_image_folder(labellers=labellers, label_names=names, **options)
    if processes.index() == 0:
        print(f"Written to {out}/.")
    return out


if __name__ == "__main__":
    main()
    processes.leave()
