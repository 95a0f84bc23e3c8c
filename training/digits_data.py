"""The 1,797 handwritten digits that ship with scikit-learn, drawn as pictures, with attributes that can be measured exactly.

The digits are real: 43 people wrote them (E. Alpaydin, C. Kaynak, UCI optical recognition of handwritten digits). This file
draws them (8x8 grey levels -> 32x32 RGB, dark ink on white paper), measures the two attributes that the recipes learn, and
writes labelled datasets with the `datasets` library, which the trainer reads like any user's own.

An *oracle* here is an exact measurement of the finished picture. The trainer never sees one; only evaluation does.
"""

from __future__ import annotations

import os
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = tuple(f"a handwritten {name}" for name in DIGIT_NAMES)
ATTRIBUTES = {"stroke": ("thin", "regular", "bold"), "slant": ("left", "upright", "right")}
IMAGE_SIZE = 32
DRAWN_SIZE = 28  # the digit itself; the rest is margin
MARGIN = (IMAGE_SIZE - DRAWN_SIZE) // 2


@lru_cache(maxsize=1)
def load_digits_arrays() -> tuple[np.ndarray, np.ndarray]:
    """Returns the real digits: (1797, 8, 8) float32 ink in [0, 1] and (1797,) int64 digit classes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return (digits.images / 16.0).astype(np.float32), digits.target.astype(np.int64)


def draw_digits(ink: torch.Tensor) -> torch.Tensor:
    """(N, 8, 8) ink in [0, 1] -> (N, 3, 32, 32) pictures in [0, 1], 1 = white paper.

    Bicubic enlargement, then a smooth contrast curve so that a stroke has an edge, as a pen's does.
    """
    large = F.interpolate(ink[:, None], size=(DRAWN_SIZE, DRAWN_SIZE), mode="bicubic", align_corners=False)
    large = ((large - 0.15) / 0.6).clamp(0.0, 1.0)
    large = large * large * (3.0 - 2.0 * large)
    page = F.pad(large, (MARGIN, MARGIN, MARGIN, MARGIN))
    return (1.0 - page).expand(-1, 3, -1, -1).contiguous()


@lru_cache(maxsize=1)
def drawn_digits() -> tuple[torch.Tensor, np.ndarray]:
    """All real digits as pictures (1797, 3, 32, 32) in [0, 1], and their classes (1797,)."""
    ink, target = load_digits_arrays()
    return draw_digits(torch.from_numpy(ink)), target


def _ink(images: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) pictures in [0, 1] -> (N, H, W) ink in float64."""
    return 1.0 - images.detach().double().mean(dim=1).clamp(0.0, 1.0)


def measure_stroke(images: torch.Tensor) -> torch.Tensor:
    """Mean ink of each picture, (N,), in [0, 1]."""
    return _ink(images).mean(dim=(1, 2))


def measure_slant(images: torch.Tensor) -> torch.Tensor:
    """Skew of each picture by image moments, mu_11 / mu_02, (N,). Positive: the top leans to the right."""
    ink = _ink(images)
    height, width = ink.shape[1:]
    rows = torch.arange(height, dtype=torch.float64, device=ink.device)[None, :, None]
    columns = torch.arange(width, dtype=torch.float64, device=ink.device)[None, None, :]
    mass = ink.sum(dim=(1, 2)).clamp_min(1e-9)
    row_mean = ((ink * rows).sum(dim=(1, 2)) / mass)[:, None, None]
    column_mean = ((ink * columns).sum(dim=(1, 2)) / mass)[:, None, None]
    mu_11 = (ink * (rows - row_mean) * (columns - column_mean)).sum(dim=(1, 2))
    mu_02 = (ink * (rows - row_mean) ** 2).sum(dim=(1, 2)).clamp_min(1e-9)
    return -mu_11 / mu_02


MEASURES = {"stroke": measure_stroke, "slant": measure_slant}


@cache
def thresholds(attribute: str) -> tuple[float, float]:
    """The terciles of the attribute over the 1,797 real digits: the borders between its three classes."""
    values = MEASURES[attribute](drawn_digits()[0]).numpy()
    low, high = np.quantile(values, [1 / 3, 2 / 3])
    return float(low), float(high)


def oracle(attribute: str, images: torch.Tensor) -> torch.Tensor:
    """Exact class of each picture: (N, C, H, W) in [0, 1] -> (N,) int64 in {0, 1, 2}."""
    if attribute not in MEASURES:
        raise ValueError(f"Unknown digits attribute {attribute!r}; choose one of {sorted(MEASURES)}.")
    borders = torch.tensor(thresholds(attribute), dtype=torch.float64, device=images.device)
    return torch.bucketize(MEASURES[attribute](images), borders)


def stroke_oracle(images: torch.Tensor) -> torch.Tensor:
    """Exact `stroke` class (0 thin, 1 regular, 2 bold) of pictures (N, C, H, W) in [0, 1]."""
    return oracle("stroke", images)


def slant_oracle(images: torch.Tensor) -> torch.Tensor:
    """Exact `slant` class (0 left, 1 upright, 2 right) of pictures (N, C, H, W) in [0, 1]."""
    return oracle("slant", images)


def _svm_features(images: torch.Tensor) -> np.ndarray:
    ink = _ink(images)[:, None, MARGIN : MARGIN + DRAWN_SIZE, MARGIN : MARGIN + DRAWN_SIZE]
    return F.adaptive_avg_pool2d(ink, 14).flatten(1).cpu().numpy()


@lru_cache(maxsize=1)
def _digit_svm():
    from sklearn.svm import SVC

    images, target = drawn_digits()
    return SVC(kernel="rbf", gamma="scale", C=10.0).fit(_svm_features(images), target)


def digit_oracle(images: torch.Tensor) -> torch.Tensor:
    """The digit that an SVM trained on the real digits reads: (N, C, H, W) in [0, 1] -> (N,) int64 in 0..9."""
    return torch.from_numpy(_digit_svm().predict(_svm_features(images)))


def prompt_oracle(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Whether each picture shows the digit its prompt asks for: (N,) bool."""
    wanted = torch.tensor([PROMPTS.index(prompt) for prompt in prompts])
    return digit_oracle(images) == wanted


def write_digits_dataset(folder: str | os.PathLike, attribute: str, num_labels: int, seed: int = 0) -> Path:
    """Writes `num_labels` real digits with their exact `attribute` labels as a `datasets` dataset: `folder/train.parquet`.

    Columns: image (PNG), label (ClassLabel). No prompt and no digit class is written. The file appears whole or not at all.

    Returns:
        The folder's path.

    Raises:
        ValueError: for an unknown attribute, or a number of labels that the 1,797 digits cannot give.
    """
    import datasets

    if attribute not in ATTRIBUTES:
        raise ValueError(f"Unknown digits attribute {attribute!r}; choose one of {sorted(ATTRIBUTES)}.")
    images, _ = drawn_digits()
    if not 1 <= num_labels <= len(images):
        raise ValueError(f"num_labels must be between 1 and {len(images)} (the real digits), got {num_labels}.")
    labels = oracle(attribute, images)
    chosen = np.random.default_rng(seed).permutation(len(images))[:num_labels]
    pictures = (images[chosen] * 255).round().byte().permute(0, 2, 3, 1).numpy()
    dataset = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(picture) for picture in pictures], "label": labels[chosen].tolist()},
        features=datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(ATTRIBUTES[attribute]))),
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dataset.to_parquet(folder / "train.parquet.tmp")
    os.replace(folder / "train.parquet.tmp", folder / "train.parquet")
    return folder
