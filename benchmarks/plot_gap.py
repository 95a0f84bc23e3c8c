"""Draws the curves of a results file: python benchmarks/plot_gap.py benchmarks/results/digits_stroke_search.json"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--least_updates", type=int, default=100, help="leave out runs with fewer updates")
    args = parser.parse_args()
    figure, axis = plt.subplots(figsize=(8, 4.5))
    for name, row in json.loads(args.results.read_text())["variants"].items():
        if row["updates"] < args.least_updates:
            continue
        seconds, objective = zip(*row["curve"], strict=True)
        log_z = row["metrics"]["base_log_partition"]
        (line,) = axis.plot(seconds, [log_z - j for j in objective], lw=1.2, label=f"{name}: {row['updates']} updates")
        axis.plot(row["seconds"], row["metrics"]["gap_from_base"], "o", color=line.get_color())
    axis.set(xlabel="seconds of training, one thread", ylabel="gap: log Z (base samples) − J (nats)", yscale="log")
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(args.results.with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
