"""The 1,797 handwritten digits that ship with scikit-learn, drawn as pictures, with attributes that can be measured exactly.

The digits are real: 43 people wrote them (E. Alpaydin, C. Kaynak, UCI optical recognition of handwritten digits). This file
draws them (8x8 grey levels -> 32x32 RGB, dark ink on white paper), measures the attributes that the recipes learn, and
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

from diffusers_ctrl import Categorical, Continuous


SOURCE = (
    "handwritten digits of 43 people (E. Alpaydin and C. Kaynak, UCI optical recognition of handwritten digits, CC BY 4.0, as scikit-learn "
    "ships them), drawn at 32x32; labelled by measuring each picture exactly"
)
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = tuple(f"a handwritten {name}" for name in DIGIT_NAMES)
ATTRIBUTES = {
    "stroke": ("thin", "regular", "bold"),
    "slant": ("left", "upright", "right"),
    "lean": ("left", "upright", "right"),
}
UNITS = {
    "stroke": "mean ink of the picture",
    "slant": "shear, columns a row to the right",
    "lean": "shear beyond that of the digit's mean",
}
# the same measurements as numbers, in standard deviations of the real digits from their mean; labels are clipped to ±VALUE_LIMIT
VALUES = {"slant_value": "slant", "lean_value": "lean"}
VALUE_LIMIT = 2.5
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


@lru_cache(maxsize=1)
def _digit_slants() -> torch.Tensor:
    """Mean `measure_slant` of the real digits that are read as 0, 1, …, 9: (10,)."""
    images, _ = drawn_digits()
    slants, digits = measure_slant(images), digit_oracle(images)
    return torch.stack([slants[digits == digit].mean() for digit in range(len(DIGIT_NAMES))])


def measure_lean(images: torch.Tensor) -> torch.Tensor:
    """Slant of each picture beyond that of the digit it shows, (N,).

    By `measure_slant` alone nearly every 6 is left and every 7 right, whoever writes them: the shape is slanted. Without the shape's own
    share all three classes are to be had of every digit.
    """
    return measure_slant(images) - _digit_slants().to(images.device)[digit_oracle(images).to(images.device)]


MEASURES = {"stroke": measure_stroke, "slant": measure_slant, "lean": measure_lean}


@cache
def _measured(attribute: str) -> np.ndarray:
    """The attribute of the 1,797 real digits, (1797,) float64."""
    return MEASURES[attribute](drawn_digits()[0]).numpy()


@cache
def thresholds(attribute: str) -> tuple[float, float]:
    """The terciles of the attribute over the 1,797 real digits: the borders between its three classes."""
    low, high = np.quantile(_measured(attribute), [1 / 3, 2 / 3])
    return float(low), float(high)


def label_attribute(name: str) -> Categorical | Continuous:
    """What a label space says of a digits attribute: its classes with thresholds and unit, or its interval and unit."""
    _check_attribute(name)
    if name in VALUES:
        return Continuous(-VALUE_LIMIT, VALUE_LIMIT, f"standard deviations of the real digits' {VALUES[name]}")
    return Categorical(ATTRIBUTES[name], thresholds(name), UNITS[name])


def _check_attribute(name: str) -> None:
    if name not in MEASURES and name not in VALUES:
        raise ValueError(f"Unknown digits attribute {name!r}; choose one of {sorted([*MEASURES, *VALUES])}.")


def oracle(attribute: str, images: torch.Tensor) -> torch.Tensor:
    """Exact label of each picture (N, C, H, W) in [0, 1]: (N,) int64 in {0, 1, 2}, or (N,) float64, not clipped, of a `_value`."""
    _check_attribute(attribute)
    if attribute in VALUES:
        real = _measured(VALUES[attribute])
        return (MEASURES[VALUES[attribute]](images) - real.mean()) / real.std()
    borders = torch.tensor(thresholds(attribute), dtype=torch.float64, device=images.device)
    return torch.bucketize(MEASURES[attribute](images), borders)


def stroke_oracle(images: torch.Tensor) -> torch.Tensor:
    """Exact `stroke` class (0 thin, 1 regular, 2 bold) of pictures (N, C, H, W) in [0, 1]."""
    return oracle("stroke", images)


def slant_oracle(images: torch.Tensor) -> torch.Tensor:
    """Exact `slant` class (0 left, 1 upright, 2 right) of pictures (N, C, H, W) in [0, 1]."""
    return oracle("slant", images)


def lean_oracle(images: torch.Tensor) -> torch.Tensor:
    """Exact `lean` class (0 left, 1 upright, 2 right) of pictures (N, C, H, W) in [0, 1]."""
    return oracle("lean", images)


def slant_value(images: torch.Tensor) -> torch.Tensor:
    """Slant of pictures (N, C, H, W) in [0, 1] in standard deviations of the real digits from their mean: (N,), positive to the right."""
    return oracle("slant_value", images)


def lean_value(images: torch.Tensor) -> torch.Tensor:
    """Lean of pictures (N, C, H, W) in [0, 1] in standard deviations of the real digits from their mean: (N,), positive to the right."""
    return oracle("lean_value", images)


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
    """Whether each picture shows the digit its prompt asks for: (N,) bool. Raises ValueError for a prompt that asks for none."""
    if unknown := [prompt for prompt in prompts if prompt not in PROMPTS]:
        raise ValueError(
            f"The digits' prompt_oracle cannot judge the prompt {unknown[0]!r}: use {PROMPTS[0]!r} to {PROMPTS[-1]!r}, or no prompt_oracle."
        )
    wanted = torch.tensor([PROMPTS.index(prompt) for prompt in prompts])
    return digit_oracle(images) == wanted


def parse_part(spec: str) -> tuple[str, int, int]:
    """'stroke' -> ("stroke", 0, 1); 'stroke@1/2', the second half of the digits -> ("stroke", 1, 2).

    Raises:
        ValueError: for an unknown attribute or a part that is not one of 0/N to N-1/N.
    """
    attribute, at, share = spec.partition("@")
    _check_attribute(attribute)
    if not at:
        return attribute, 0, 1
    numbers = share.split("/")
    if len(numbers) != 2 or not all(n.isdecimal() for n in numbers) or not int(numbers[0]) < int(numbers[1]):
        raise ValueError(
            f"Digits {spec!r} must be ATTRIBUTE or ATTRIBUTE@PART/PARTS with PART from 0 to PARTS - 1, as in stroke@0/2."
        )
    return attribute, int(numbers[0]), int(numbers[1])


def write_digits_dataset(folder: str | os.PathLike, spec: str, num_labels: int | None = None, seed: int = 0) -> Path:
    """Writes real digits with their exact labels as a `datasets` dataset: `folder/train.parquet`.

    Columns: image (PNG), label (ClassLabel, or float of a `_value`). No prompt and no digit class is written. The file appears whole or
    not at all.

    Args:
        spec: the attribute, 'stroke', or the attribute and a part of the digits, 'stroke@0/2'. With one seed the parts 0/N to N-1/N have
            no digit in common and together have all, whatever their attributes.
        num_labels: the first so many digits of the part, in the seed's order; all by default.

    Returns:
        The folder's path.

    Raises:
        ValueError: for an unknown attribute or part, or a number of labels that the part cannot give.
    """
    import datasets

    attribute, part, parts = parse_part(spec)
    images, _ = drawn_digits()
    rows = np.array_split(np.random.default_rng(seed).permutation(len(images)), parts)[part]
    num_labels = len(rows) if num_labels is None else num_labels
    if not 1 <= num_labels <= len(rows):
        raise ValueError(f"num_labels must be between 1 and {len(rows)} (the real digits of {spec!r}), got {num_labels}.")
    chosen = rows[:num_labels]
    labels = oracle(attribute, images)[chosen]
    kind = datasets.Value("float32") if attribute in VALUES else datasets.ClassLabel(names=list(ATTRIBUTES[attribute]))
    if attribute in VALUES:
        labels = labels.clamp(-VALUE_LIMIT, VALUE_LIMIT)
    pictures = (images[chosen] * 255).round().byte().permute(0, 2, 3, 1).numpy()
    dataset = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(picture) for picture in pictures], "label": labels.tolist()},
        features=datasets.Features(image=datasets.Image(), label=kind),
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dataset.to_parquet(folder / "train.parquet.tmp")
    os.replace(folder / "train.parquet.tmp", folder / "train.parquet")
    return folder
