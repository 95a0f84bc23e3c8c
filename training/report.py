"""What a finished run leaves for people: the table on the screen, metrics.json, the sample grid, the confusion matrices."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffusers_ctrl.accuracy import confusion_matrix
from diffusers_ctrl.evaluation import Samples, by_gamma, lower_bounds
from diffusers_ctrl.labels import Categorical, LabelSpace
from figures import plot_asked_and_found, plot_confusion


def print_table(metrics: dict[str, Any], names: Sequence[str]) -> None:
    """The figures that matter, for a person: tuned, base and exact law side by side, then by gamma, by attribute and by label."""

    def cell(name: str, digits: int = 3) -> str:
        if metrics.get(name) is None:
            return "-"
        error = metrics.get(f"{name}_se")
        return f"{metrics[name]:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")

    print(f"\n{'':24}{'tuned':>18}{'base':>18}{'exact law':>18}")
    for name in ("accuracy", "macro_f1", "prompt_accuracy", "log_likelihood"):
        print(f"{name:24}{cell(name):>18}{cell('base_' + name):>18}{cell('exact_' + name):>18}")
    print(f"{'log_partition (nats)':24}{cell('log_partition'):>18}{cell('base_log_partition'):>18}")
    for name in ("objective", "kl", "gap", "gap_from_base"):
        print(f"{name + ' (nats)':24}{cell(name):>18}")
    print(f"{'effective sample size':24}{metrics['ess']:>18.0f}   (smallest prompt-label pair: {metrics['smallest_ess']:.1f})")
    if metrics["gap_is_lower_bound"]:
        print("warning: the effective sample size of some pair is under 10, so gap is only a lower bound.")
    if metrics.get("base_smallest_ess", 10) < 10:
        print("warning: the base samples' effective size is under 10 for some pair: gap_from_base is too small as well.")
    for line in _attribute_lines(metrics):
        print(line)
    for gamma, row in by_gamma(metrics).items():
        print(f"  gamma {gamma:<16g}" + _line(row, ("accuracy", "exact_accuracy", "kl", "gap", "gap_from_base")))
    for name in names:
        row = {
            key.removeprefix(f"by_label.{name}."): value for key, value in metrics.items() if key.startswith(f"by_label.{name}.")
        }
        print(f"  {name:22}" + _line(row, ("accuracy", "kl", "gap")))


def _line(row: dict[str, Any], names: Sequence[str]) -> str:
    """These figures of a row in one line; a gap that is only a lower bound as "gap >= 1.234"."""
    doubtful = lower_bounds(row)
    return "  ".join(f"{k} {'>= ' if k in doubtful else ''}{row[k]:.3f}" for k in names if row.get(k) is not None)


def _attribute_lines(metrics: dict[str, Any]) -> list[str]:
    """One line an attribute, where there are several or one is continuous; and one for each set of attributes that labels give."""
    lines = []
    for kind, names in (
        ("by_attribute", ("accuracy", "correlation", "mean_error")),
        ("by_given", ("accuracy", "exact_accuracy", "kl", "gap", "gap_from_base")),
    ):
        found = dict.fromkeys(key.split(".")[1] for key in metrics if key.startswith(f"{kind}."))
        for name in found:
            row = {key: metrics.get(f"{kind}.{name}.{key}") for key in (*names, "gap_is_lower_bound", "base_smallest_ess")}
            row = {key: value for key, value in row.items() if value is not None}
            if kind == "by_attribute":
                row |= {f"exact law's {key}": metrics.get(f"exact_{kind}.{name}.{key}") for key in names}
            title = f"labels giving {name}" if kind == "by_given" else name
            lines.append(f"  {title:22}" + _line(row, [*names, *(f"exact law's {key}" for key in names)]))
    return lines


def write_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    """metrics.json, whole or not at all."""
    (folder / "metrics.json.tmp").write_text(json.dumps(metrics, indent=2) + "\n")
    os.replace(folder / "metrics.json.tmp", folder / "metrics.json")


def plot_agreement(folder: Path, space: LabelSpace, labels: torch.Tensor, tuned: Samples) -> None:
    """confusion.png, or one confusion-NAME.png an attribute where there are several: what was asked for against what was found."""
    asked, found = labels.cpu()[tuned.label_rows], tuned.measured
    for column, (name, attribute) in enumerate(space.attributes.items()):
        path = folder / ("confusion.png" if len(space) == 1 else f"confusion-{name}.png")
        given = ~asked[:, column].isnan()
        a, f = asked[given, column], found[given, column]
        if isinstance(attribute, Categorical):
            plot_confusion(confusion_matrix(a.long(), f.long(), len(attribute.names)), attribute.names, path)
        else:
            plot_asked_and_found(a, f, name, attribute.unit, path)
