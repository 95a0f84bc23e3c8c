"""Are the certificate's standard errors honest? Many certificates of one adapter, each of fresh trajectories, and how far they really are apart.

    python benchmarks/gap_spread.py --adapter digits-stroke [--blocks 20] [--per_label 100] [--gamma 1]

A block is what training certifies an adapter with: `per_label` trajectories of each label, prompts in turn. `spread` is the standard deviation of the
blocks' figures, `claimed` the root mean square of the standard errors that they came with; the ratio of the two should be 1, and 20 blocks know it
to a sixth. `tail`: quantiles of the trajectories' own gamma · log p̂ less their log-ratio to the base, whose mean is J; for the exact law all would
be log Z.
Writes results/gap_spread.json.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tqdm.auto import tqdm


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "training")]
from diffusers_ctrl.adapters import load_adapter, resolve_folder  # noqa: E402
from diffusers_ctrl.evaluation import certificate, draw_samples  # noqa: E402
from evaluate import adapter_environment  # noqa: E402
from records import RESULTS, provenance, write_json  # noqa: E402
from task import parse_arguments  # noqa: E402


FIGURES = ("objective", "log_partition", "gap")
TAIL = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.95)


def spread_of(values: list[float], errors: list[float]) -> dict[str, float]:
    """mean and its standard error; spread, claimed and their ratio: see above."""
    spread, claimed = statistics.stdev(values), math.sqrt(statistics.mean(error**2 for error in errors))
    mean = {"mean": statistics.mean(values), "mean_se": spread / math.sqrt(len(values))}
    return mean | {"spread": spread, "claimed": claimed, "ratio": spread / claimed}


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default="digits-stroke")
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--per_label", type=int, default=100)
    parser.add_argument("--gamma", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "gap_spread.json")
    args = parser.parse_args(given)
    torch.set_num_threads(1)
    task, _ = parse_arguments(["--config", str(ROOT / "training/configs/digits_stroke.yaml")])
    policy, environment = adapter_environment(load_adapter(resolve_folder(args.adapter)), task)
    environment = replace(environment, gamma=args.gamma)
    found, worth = [], []
    with torch.no_grad(), policy.merged():
        for block in (bar := tqdm(range(args.blocks), unit="certificate")):
            generator = torch.Generator().manual_seed(args.seed * 1_000_003 + block)
            drawn = draw_samples(policy, environment, args.per_label, generator, keep_images=False, progress=False)
            found.append(certificate(drawn, args.gamma))
            worth.append(args.gamma * drawn.log_likelihood - drawn.log_ratio)
            bar.set_postfix(
                J=f"{found[-1].objective:.2f} ± {found[-1].objective_se:.2f}", gap=f"{found[-1].gap:.2f} ± {found[-1].gap_se:.2f}"
            )
    worth = torch.cat(worth)
    record = {
        name: spread_of([getattr(one, name) for one in found], [getattr(one, f"{name}_se") for one in found]) for name in FIGURES
    }
    record["lower_bounds"] = sum(one.is_lower_bound for one in found)
    record["tail"] = {str(q): worth.quantile(q).item() for q in TAIL}
    about = {"adapter": args.adapter, "blocks": args.blocks, "per_label": args.per_label, "gamma": args.gamma, "seed": args.seed}
    write_json(args.output, {**about, **record, **provenance()})
    for name in FIGURES:
        print(f"{name:14} " + "  ".join(f"{key} {value:.3f}" for key, value in record[name].items()))
    print(f"tail {record['tail']}\nWritten to {args.output}.")


if __name__ == "__main__":
    main()
