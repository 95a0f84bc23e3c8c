"""What a finished run leaves for people: the table on the screen, metrics.json, the confusion matrices, and all of it on one page."""

from __future__ import annotations

import base64
import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

import torch

from diffusers_ctrl import CTRLConfig
from diffusers_ctrl.accuracy import confusion_matrix
from diffusers_ctrl.checkpoints import write_file
from diffusers_ctrl.evaluation import Samples, by_gamma, lower_bounds
from diffusers_ctrl.labels import Categorical, LabelSpace
from figures import plot_asked_and_found, plot_confusion
from task import TaskConfig


def print_table(metrics: dict[str, Any], names: Sequence[str]) -> None:
    """The figures that matter, for a person: tuned, base and exact law side by side, then by gamma, by attribute and by label."""

    print(f"\n{'':24}{'tuned':>18}{'base':>18}{'exact law':>18}")
    for title, *cells in _certificate_rows(metrics):
        print(f"{title:24}" + "".join(f"{cell:>18}" for cell in cells))
    print(f"{'effective sample size':24}{metrics['ess']:>18.0f}   (smallest prompt-label pair: {metrics['smallest_ess']:.1f})")
    for line in _warnings(metrics):
        print(f"warning: {line}")
    for line in _attribute_lines(metrics):
        print(line)
    for gamma, row in by_gamma(metrics).items():
        print(f"  gamma {gamma:<16g}" + _line(row, ("accuracy", "exact_accuracy", "kl", "gap", "gap_from_base")))
    for name in names:
        print(f"  {name:21} " + _line(_of_label(metrics, name), ("accuracy", "kl", "gap")))


def _of_label(metrics: dict[str, Any], name: str) -> dict[str, Any]:
    """A label's own figures."""
    prefix = f"by_label.{name}."
    return {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}


def _line(row: dict[str, Any], names: Sequence[str]) -> str:
    """These figures of a row in one line; a gap that is only a lower bound as "gap >= 1.234"."""
    doubtful = lower_bounds(row)
    return "  ".join(f"{k} {'>= ' if k in doubtful else ''}{row[k]:.3f}" for k in names if row.get(k) is not None)


def _cell(row: dict[str, Any], name: str) -> str:
    """A figure of a row with its standard error; a gap that is only a lower bound as ">= 1.234"."""
    if row.get(name) is None:
        return "-"
    error = row.get(f"{name}_se")
    return f"{'>= ' if name in lower_bounds(row) else ''}{row[name]:.3f}" + (f" ± {error:.3f}" if error is not None else "")


def _certificate_rows(metrics: dict[str, Any]) -> list[tuple[str, ...]]:
    """(name, tuned, base, exact law), or (name, tuned) for what only the tuned model has."""
    rows = [
        (name, *(_cell(metrics, prefix + name) for prefix in ("", "base_", "exact_")))
        for name in ("accuracy", "macro_f1", "prompt_accuracy", "log_likelihood")
    ]
    rows.append(("log_partition (nats)", _cell(metrics, "log_partition"), _cell(metrics, "base_log_partition")))
    return rows + [(f"{name} (nats)", _cell(metrics, name)) for name in ("objective", "kl", "gap", "gap_from_base")]


def _warnings(metrics: dict[str, Any]) -> list[str]:
    """What must be read beside the figures."""
    found = []
    if metrics["gap_is_lower_bound"]:
        found.append("the effective sample size of some pair is under 10, so gap is only a lower bound.")
    if metrics.get("base_smallest_ess", 10) < 10:
        found.append("the base samples' effective size is under 10 for some pair: gap_from_base is too small as well.")
    return found


def _attribute_lines(metrics: dict[str, Any]) -> list[str]:
    """One line an attribute, where there are several or one is continuous; and one for each set of attributes that labels give."""
    lines = []
    for kind, names in (
        ("by_attribute", ("accuracy", "correlation", "mean_error")),
        ("by_given", ("accuracy", "exact_accuracy", "kl", "gap", "gap_from_base")),
    ):
        own = [key.removeprefix(f"{kind}.") for key in metrics if key.startswith(f"{kind}.")]
        found = dict.fromkeys(key.rpartition(".")[0] for key in own)  # a figure's name has no dot, an attribute's may
        for name in found:
            row = {key: metrics.get(f"{kind}.{name}.{key}") for key in (*names, "gap_is_lower_bound", "base_smallest_ess")}
            row = {key: value for key, value in row.items() if value is not None}
            if kind == "by_attribute":
                row |= {f"exact law's {key}": metrics.get(f"exact_{kind}.{name}.{key}") for key in names}
            title = f"labels giving {name}" if kind == "by_given" else name
            lines.append(f"  {title:21} " + _line(row, [*names, *(f"exact law's {key}" for key in names)]))
    return lines


def write_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    """metrics.json, whole or not at all. Confusion matrices that are there already are not of these figures, and go."""
    for pattern in ("confusion.png", "confusion-*.png"):
        for picture in folder.glob(pattern):
            picture.unlink()
    write_file(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")


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


PICTURES = {  # file, without suffix: what it shows
    "curves": "J against log Z, and its parts, during training",
    "samples": "Samples: each column has the same noise and prompt",
    "confusion": "What was asked for against what was measured",
}
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font-family: sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0 }} td, th {{ padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: right }}
td:first-child, th:first-child {{ text-align: left }} img {{ max-width: 100% }} pre {{ background: #f4f4f4; padding: .6rem; overflow-x: auto }}
.warning {{ color: #a63603 }}
</style></head><body>
{body}
</body></html>
"""


def _table(rows: Iterable[Sequence[Any]], header: Sequence[str] = ()) -> str:
    def line(cells: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + (line(header, "th") if header else "") + "".join(line(row, "td") for row in rows) + "</table>"


def write_report(
    folder: Path,
    metrics: dict[str, Any],
    history: Sequence[dict[str, float]],
    names: Sequence[str],
    task: TaskConfig,
    config: CTRLConfig,
) -> Path:
    """report.html: certificate, labels, pictures, settings and versions on one page that needs no other file. Whole or not at all.

    The pictures are those that are in `folder`. Whatever comes from settings, labels or the command line is escaped.
    """
    figures = ("accuracy", "log_likelihood", "kl", "objective", "log_partition", "gap")
    asked = " and ".join(task.attribute)
    parts = [
        f"<h1>{escape(asked)} on {escape(task.base)}</h1>",
        f"<p>{len(history)} updates in {metrics['seconds_train']:.0f} s, seed {config.seed}. Log-likelihoods, KL, J and gap are in nats, summed "
        "over dimensions; ± is one standard error.</p>",
        "<h2>Certificate</h2>",
        _table(_certificate_rows(metrics), ("", "tuned", "base", "exact law")),
        f"<p>Effective sample size {metrics['ess']:.0f}, of the smallest prompt-label pair {metrics['smallest_ess']:.1f}.</p>",
        *(f'<p class="warning">Warning: {escape(line)}</p>' for line in _warnings(metrics)),
        "<h2>By label</h2>",
        _table([(name, *(_cell(_of_label(metrics, name), key) for key in figures)) for name in names], ("label", *figures)),
    ]
    if rows := by_gamma(metrics):
        shown = ("accuracy", "exact_accuracy", "kl", "gap", "gap_from_base")
        cells = [(f"{gamma:g}", *(_cell(row, key) for key in shown)) for gamma, row in rows.items()]
        parts += ["<h2>By gamma</h2>", _table(cells, ("gamma", *shown))]
    for stem, title in PICTURES.items():
        for picture in sorted(folder.glob(f"{stem}*.png")):
            data = base64.b64encode(picture.read_bytes()).decode()
            parts.append(f'<h2>{escape(title)}</h2><img alt="{escape(picture.stem)}" src="data:image/png;base64,{data}">')
    settings = {**asdict(task), **asdict(config)}
    parts += [
        "<h2>Command</h2>",
        f"<pre>{escape(shlex.join(sys.argv))}</pre>",
        "<h2>Settings</h2>",
        _table(sorted(settings.items())),
        "<h2>Versions</h2>",
        _table(sorted(metrics["versions"].items())),
    ]
    page = PAGE.format(title=escape(f"{asked} on {task.base}"), body="\n".join(parts))
    write_file(folder / "report.html", page)
    return folder / "report.html"
