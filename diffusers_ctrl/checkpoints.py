"""Checkpoints of a run: numbered folders that are there whole or not at all, verified when read, pruned; and what may differ on resuming.

    checkpoints/checkpoint-000100/trainer_state.json           numbers, history, settings
                                  trainer_state.safetensors    weights, optimizer, baseline
                                  manifest.json                size and SHA-256 of both

A checkpoint is written under a temporary name (.tmp), every file and the folder are flushed to the disk, and then it is renamed. So a
process may be killed at any moment: a folder that has its name is complete, and one that has not is never read and is cleared away by the
next write. Where the number is taken, the older folder is renamed (.previous) before, not removed: one of the two is always there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


STATE_NAME = "trainer_state.json"
TENSORS_NAME = "trainer_state.safetensors"
MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1
_NAME = re.compile(r"checkpoint-(\d{6,})(\.previous)?")


@dataclass(frozen=True)
class Checkpoint:
    """state: what JSON can hold, with "update" among it. tensors: by name, on the CPU. folder: where it was read."""

    folder: Path
    state: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def checkpoint_folder(root: Path, update: int) -> Path:
    return root / f"checkpoint-{update:06d}"


def find_checkpoints(root: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    found = {path: match for path in root.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name)) and path.is_dir()}
    return sorted(found, key=lambda path: (int(found[path][1]), found[path][2] is None))


def _flush_folder(folder: Path) -> None:
    with contextlib.suppress(PermissionError):  # where folders cannot be opened there is nothing to flush
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _seal(path: Path) -> dict[str, Any]:
    """Flushes a file to the disk; its size and SHA-256."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_file(path: Path, text: str) -> None:
    """Writes a small file whole or not at all: under a temporary name, flushed to the disk and renamed."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    _seal(temporary)
    os.replace(temporary, path)
    _flush_folder(path.parent)


def _remove(folder: Path) -> None:
    """Removes a checkpoint; one that is half removed has lost its name."""
    leaving = folder.with_name(f"{folder.name}.removed.tmp")
    shutil.rmtree(leaving, ignore_errors=True)
    os.replace(folder, leaving)
    shutil.rmtree(leaving, ignore_errors=True)


def write_checkpoint(
    root: Path, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], *, keep: int, best: int | None = None
) -> Path:
    """Writes the checkpoint of state["update"], and then removes those that are not kept.

    Those of later updates are removed too: they belong to a run that was left for this one.

    Args:
        root: folder of all checkpoints. keep: how many are kept, the latest. best: update of one that is kept besides.

    Returns:
        The folder.

    Raises:
        OSError: if it cannot be written (disk full, no permission); the checkpoints that were there are untouched.
    """
    folder = checkpoint_folder(root, state["update"])
    root.mkdir(parents=True, exist_ok=True)
    _clear(root)
    temporary = root / f"{folder.name}.tmp"
    temporary.mkdir()
    try:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary / TENSORS_NAME)
        (temporary / STATE_NAME).write_text(json.dumps(state) + "\n")
        manifest = {"format_version": FORMAT_VERSION, "files": {n: _seal(temporary / n) for n in (STATE_NAME, TENSORS_NAME)}}
        (temporary / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")
        _seal(temporary / MANIFEST_NAME)
        _flush_folder(temporary)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        there = find_checkpoints(root)
        last = f"the last one is {there[-1]}" if there else "there is none before it"
        raise OSError(f"The checkpoint {folder} could not be written ({error}); {last}.") from error
    previous = folder.with_name(f"{folder.name}.previous")
    if folder.exists():
        os.replace(folder, previous)
    os.replace(temporary, folder)
    _flush_folder(root)
    if previous.exists():
        _remove(previous)
    _prune(root, state["update"], keep, best)
    return folder


def _clear(root: Path) -> None:
    """Ends what a process that was killed in a write had begun."""
    for leftover in root.glob("*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    for previous in root.glob("checkpoint-*.previous"):
        folder = previous.with_suffix("")
        if folder.exists():
            _remove(previous)
        else:
            os.replace(previous, folder)


def _prune(root: Path, update: int, keep: int, best: int | None) -> None:
    there = find_checkpoints(root)
    ours = {number: path for path in there if (number := int(_NAME.fullmatch(path.name)[1])) <= update}
    kept = {ours[number] for number in [*sorted(ours)[-max(keep, 1) :], best] if number in ours}
    for path in there:
        if path not in kept:
            _remove(path)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads a checkpoint and holds it against its manifest.

    Raises:
        ValueError: if it is not exactly what was written; says what is wrong with it.
    """
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text())
        if (version := manifest["format_version"]) != FORMAT_VERSION:
            raise ValueError(f"its format version is {version}, and {FORMAT_VERSION} is known here")
        for name in (STATE_NAME, TENSORS_NAME):
            written = manifest["files"][name]
            if (size := (folder / name).stat().st_size) != written["bytes"]:
                raise ValueError(f"{name} has {size:,} bytes where {written['bytes']:,} were written")
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != written["sha256"]:
                    raise ValueError(f"{name} does not have the SHA-256 that was written")
        return Checkpoint(folder, json.loads((folder / STATE_NAME).read_text()), load_file(folder / TENSORS_NAME))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = f"{MANIFEST_NAME} is not as it was written" if isinstance(error, (KeyError, TypeError)) else str(error)
        raise ValueError(f"{folder} is not a whole checkpoint: {reason}.") from error


def read_latest(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The latest checkpoint that is whole, and a sentence for each later one that is not. None where there is no checkpoint at all.

    Raises:
        ValueError: if there are checkpoints, and none is whole.
    """
    damaged = []
    for folder in reversed(find_checkpoints(root)):
        try:
            return read_checkpoint(folder), damaged
        except ValueError as error:
            damaged.append(str(error))
    if damaged:
        raise ValueError(f"None of the {len(damaged)} checkpoints in {root} is whole: {' '.join(damaged)}")
    return None, []


def differences(saved: Mapping[str, Any], ours: Mapping[str, Any], names: Sequence[str] | None = None) -> list[str]:
    """A phrase for each setting whose value is not the saved one's: 'gamma = 2.0 (1.0 in the checkpoint)'.

    Args:
        names: of the settings to compare; all that either has by default.
    """
    saved, ours = json.loads(json.dumps(saved)), json.loads(json.dumps(ours))  # tuples are lists there

    def short(value: Any) -> str:
        text = repr(value)
        return text if len(text) <= 80 else f"{text[:80]}…"

    names = [*dict.fromkeys([*ours, *saved])] if names is None else names
    return [
        f"{name} = {short(ours.get(name))} ({short(saved.get(name))} in the checkpoint)"
        for name in names
        if saved.get(name) != ours.get(name)
    ]


def check_resumable(
    found: Checkpoint,
    settings: Mapping[str, Any],
    identity: Mapping[str, Any],
    named: Mapping[str, torch.Tensor],
    law: Sequence[str],
    defaults: Mapping[str, Any] | None = None,
) -> list[str]:
    """Sentences on settings that were changed since the checkpoint.

    Args:
        settings, identity: of the run that would go on; a checkpoint's state has both. named: its trainable parameters. law: names of the
            settings that fix what is learned; the others belong to the way there. defaults: what a setting is
            of which a checkpoint is too old to know.

    Raises:
        ValueError: where the checkpoint's weights would mean something else now; names what differs.
    """
    known = {name: value for name, value in (defaults or {}).items() if name in settings}
    before = {**known, **found.state["settings"]}
    wrong = differences(before, settings, law) + differences(found.state["identity"], identity)
    shapes = {name: value.shape for name, value in part(found.tensors, "parameter.").items()}
    if not wrong and shapes != {name: parameter.shape for name, parameter in named.items()}:
        wrong = ["its trainable parameters are not this run's"]
    if wrong:
        raise ValueError(
            f"{found.folder} is of another run, and cannot be resumed: {'; '.join(wrong)}. Give the same settings, or start in another "
            "output_dir."
        )
    changed = differences(before, settings, [name for name in {**settings, **before} if name not in law])
    return [f"Resumed with other settings, so the weights will not be those of one run: {'; '.join(changed)}."] if changed else []


def part(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]], numbers: int | None = None) -> str:
    """SHA-256 of tensors with their names, types and shapes; with `numbers`, of about so many numbers of each only, which costs nothing."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        flat = tensor.detach().flatten()
        if numbers is not None:
            flat = flat[:: max(1, len(flat) // numbers)]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(flat.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
