"""A labelled dataset drawn from the base itself: its samples, labelled by a Python function."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from diffusers_ctrl.bases import row_arguments


def write_sampled_dataset(
    folder: str | os.PathLike,
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    labeller: Callable[[torch.Tensor], torch.Tensor],
    names: Sequence[str],
    num_labels: int,
    *,
    batch_size: int = 8,
    seed: int = 0,
    **call_kwargs,
) -> Path:
    """Draws `num_labels` images, labels them, and writes `folder/train.parquet` (image, label as ClassLabel), whole or not at all.

    Args:
        labeller: images (N, 3, H, W) in [0, 1] -> (N,) class indices into `names`.
        call_kwargs: passed to the pipeline's call (num_inference_steps, guidance_scale, eta, …).
    """
    pipe.set_progress_bar_config(disable=True)
    pictures, labels = [], []
    bar = tqdm(total=num_labels, desc="drawing a dataset", unit="image")
    while len(pictures) < num_labels:
        rows = range(len(pictures), min(len(pictures) + batch_size, num_labels))
        start = row_arguments(pipe, [prompts[row % len(prompts)] for row in rows])
        generator = torch.Generator().manual_seed(seed * 1_000_003 + rows.start)
        images = pipe(**start, generator=generator, output_type="pt", **call_kwargs).images.float().cpu()
        labels += labeller(images).tolist()
        pictures += pipe.image_processor.numpy_to_pil(images.permute(0, 2, 3, 1).numpy())
        bar.update(len(rows))
    bar.close()
    dataset = datasets.Dataset.from_dict(
        {"image": pictures, "label": labels},
        features=datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(names))),
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dataset.to_parquet(folder / "train.parquet.tmp")
    os.replace(folder / "train.parquet.tmp", folder / "train.parquet")
    return folder
