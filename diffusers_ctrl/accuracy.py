"""How well what was asked for agrees with what an oracle measures on the finished images, of tuned samples and of the exact law alike.

An oracle answers images (N, C, H, W) with the attributes that it measures there: (N, A), or (N,) for a single attribute; class
indices of categorical attributes, values of continuous ones. It is never seen in training.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .labels import Continuous, LabelSpace


LabelOracle = Callable[[torch.Tensor], torch.Tensor]


def measure(oracle: LabelOracle, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The oracle's answer for `images` as (N, A) float64 on the CPU, A being the number of columns of `labels`.

    Raises:
        ValueError: if it does not answer with one number an image and attribute.
    """
    found = torch.as_tensor(oracle(images)).detach().cpu().double()
    found = found.unsqueeze(1) if found.ndim == 1 else found
    if found.shape != (len(images), labels.shape[1]):
        raise ValueError(
            f"The oracle must measure {labels.shape[1]} attributes of each of {len(images)} images; it gave {tuple(found.shape)}."
        )
    return found


def hits(space: LabelSpace | None, asked: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """(N,) 1 where every categorical attribute that was asked for was found, else 0; NaN where none was asked for."""
    columns = _columns(space, asked.shape[1])[0]
    given = ~asked[:, columns].isnan()
    right = ((asked == found)[:, columns] | ~given).all(dim=1).double()
    return torch.where(given.any(dim=1), right, torch.nan)


def agreement(
    space: LabelSpace | None, asked: torch.Tensor, found: torch.Tensor, weights: torch.Tensor | None = None
) -> dict[str, float]:
    """Agreement of asked (N, A), NaN where free, with found (N, A), each row with its weight (N,), equal by default.

    Returns:
        accuracy: of all categorical attributes asked for in a row together. macro_f1: mean over these attributes. With several
        attributes or a continuous one also by_attribute.{name}.accuracy, .macro_f1, and of continuous ones .correlation and
        .mean_error (mean absolute, in the attribute's unit), each over the rows that ask for the attribute.
    """
    weights = torch.ones(len(asked), dtype=torch.float64) if weights is None else weights.double()
    categorical, continuous = _columns(space, asked.shape[1])
    names = ["label"] if space is None else list(space.attributes)
    out: dict[str, float] = {}
    right = hits(space, asked, found)
    if (~right.isnan()).any():
        out["accuracy"] = (weights * right)[~right.isnan()].sum().item() / weights[~right.isnan()].sum().item()
    scores, parts = [], {}
    for column in categorical:
        given = ~asked[:, column].isnan()
        if not given.any():
            continue
        a, f, w = asked[given, column], found[given, column], weights[given]
        classes = int(max(a.max(), f.max())) + 1 if space is None else len(list(space.attributes.values())[column].names)
        scores.append(macro_f1(confusion_matrix(a.long(), f.long(), classes, w)))
        parts[f"by_attribute.{names[column]}.accuracy"] = ((w * (a == f)).sum() / w.sum()).item()
        parts[f"by_attribute.{names[column]}.macro_f1"] = scores[-1]
    if scores:
        out["macro_f1"] = sum(scores) / len(scores)
    for column in continuous:
        given = ~asked[:, column].isnan()
        if not given.any():
            continue
        a, f, w = asked[given, column].double(), found[given, column], weights[given] / weights[given].sum()
        da, df = a - (w * a).sum(), f - (w * f).sum()
        spread = ((w * da * da).sum() * (w * df * df).sum()).sqrt()
        parts[f"by_attribute.{names[column]}.correlation"] = ((w * da * df).sum() / spread.clamp_min(1e-300)).item()
        parts[f"by_attribute.{names[column]}.mean_error"] = (w * (a - f).abs()).sum().item()
    return out | (parts if asked.shape[1] > 1 or continuous else {})


def _columns(space: LabelSpace | None, count: int) -> tuple[list[int], list[int]]:
    """Columns of the categorical and of the continuous attributes."""
    if space is None:
        return list(range(count)), []
    kinds = [isinstance(attribute, Continuous) for attribute in space.attributes.values()]
    return [i for i, kind in enumerate(kinds) if not kind], [i for i, kind in enumerate(kinds) if kind]


def macro_f1(confusion: torch.Tensor) -> float:
    """Macro-averaged F1 of a confusion matrix (asked, found), any non-negative weights."""
    hit = confusion.diag()
    return (2 * hit / (confusion.sum(0) + confusion.sum(1)).clamp_min(1e-12)).mean().item()


def confusion_matrix(asked: torch.Tensor, found: torch.Tensor, classes: int, weights: torch.Tensor | None = None) -> torch.Tensor:
    """(classes, classes) counts, or sums of weights: row = label asked for, column = the oracle's label."""
    return torch.bincount(asked * classes + found, weights, minlength=classes**2).view(classes, classes).double()
