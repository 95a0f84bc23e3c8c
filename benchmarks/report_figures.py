"""The figures that report.py draws from results/."""

from __future__ import annotations

from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from records import save_figure  # noqa: E402
from report_format import mean_and_error, read, seeded  # noqa: E402
from report_tables import LEARNERS, aim_row  # noqa: E402


def plot_sample_efficiency(path: Path) -> None:
    found = read("sample_efficiency")
    counts_of = {method: sorted({one["num_labels"] for one in found if one["method"] == method}) for method in LEARNERS}
    if not any(len(counts) > 1 for counts in counts_of.values()):
        return  # a point is no curve
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 3.8), layout="constrained")
    for color, (method, name) in zip(("C2", "C0", "gray", "C1"), LEARNERS.items(), strict=True):
        own, counts = [one for one in found if one["method"] == method], counts_of[method]
        if not counts:
            continue
        for axis, key, style, aim, what in (
            (axes[0], "accuracy", "o-", "accuracy", "tuned"),
            (axes[0], "accuracy", "o:", "plain", "plain"),
            (axes[1], "tv", "o-", "distance", "tuned"),
            (axes[1], "tv", "o:", "plain", "plain"),
        ):
            rows = [[aim_row(one, aim) for one in own if one["num_labels"] == count] for count in counts]
            points = [mean_and_error([row[key] for row in group], [row[f"{key}_se"] for row in group]) for group in rows]
            means, errors = zip(*points, strict=True)
            axis.errorbar(counts, means, errors, fmt=style, color=color, ms=4, capsize=3, label=f"{name}, {what}")
    axes[1].axhline(found[0]["tv_floor"], color="black", lw=0.8, ls="--", label="exact draws of the truth")
    axes[0].set(ylabel="accuracy by the exact oracle")
    axes[1].set(ylabel="total variation to the truth")
    for axis in axes:
        axis.set(xlabel="labelled images", xscale="log")
        axis.set_xticks([50, 100, 200, 400, 800, 1600], ["50", "100", "200", "400", "800", "1600"], minor=False)
        axis.minorticks_off()
    lines = dict(zip(*(axes[1].get_legend_handles_labels()[::-1]), strict=True))  # has the other's, and the floor
    figure.legend(lines.values(), lines.keys(), loc="outside right center", fontsize=8)
    save_figure(figure, path)


def plot_time_to_gap(path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 4))
    for one in read("time_to_gap"):
        seconds, gap, error = zip(*((p["seconds"], p["gap"], p["gap_se"]) for p in one["curve"]), strict=True)
        axis.errorbar(seconds, gap, error, fmt="o-", ms=4, capsize=3, label=seeded(one))
    axis.set(xlabel="seconds of training, one core", ylabel="gap: log Z (base samples) − J (nats)", xscale="log", yscale="log")
    axis.legend(fontsize=8)
    figure.tight_layout()
    save_figure(figure, path)


FIGURES = {"sample_efficiency": plot_sample_efficiency, "time_to_gap": plot_time_to_gap}
