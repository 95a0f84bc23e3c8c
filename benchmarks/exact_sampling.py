"""Exact sampling on the digits: does the law of (digit, stroke decile) tend to the exact one as the number of particles grows?

    python benchmarks/exact_sampling.py --adapter DIR [--base_samples 50000] [--outputs 300] [--seed 0]

The exact law comes from base samples reweighted by p̂(y | x)^gamma, prompt by prompt. For n particles the tuned model's trajectories are
cut in groups of n, each group normalises its weights, and the groups' mean is the law that `pipe(..., num_particles=n)` draws from. The
noise floor is the same distance for as many independent draws from the exact law as the groups have effective samples.
Writes results/exact_sampling.json and .png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "training")]
from exact_reference import DECILES, distance, histogram  # noqa: E402

from diffusers_ctrl.adapters import load_adapter, resolve_folder  # noqa: E402
from diffusers_ctrl.evaluation import draw_samples  # noqa: E402
from diffusers_ctrl.labels import label_grid  # noqa: E402
from diffusers_ctrl.particles import effective_sample_size  # noqa: E402
from diffusers_ctrl.rollouts import Environment  # noqa: E402
from digits_data import digit_oracle, measure_stroke  # noqa: E402
from evaluate import adapter_environment  # noqa: E402
from records import RESULTS, provenance, write_json  # noqa: E402
from task import parse_arguments  # noqa: E402


PARTICLES = (1, 2, 4, 8, 16, 32)


@torch.no_grad()
def all_scores(environment: Environment, images: torch.Tensor) -> torch.Tensor:
    """gamma · log p̂ of every label: (N, labels), nats."""
    columns = [
        torch.cat([environment.reward(part, row.expand(len(part), -1)) for part in images.split(500)]) for row in environment.labels
    ]
    return environment.gamma * torch.stack(columns, dim=1).double()


def base_pool(policy, environment: Environment, count: int, seed: int) -> dict[str, torch.Tensor]:
    """digit, ink, prompt (N,) and scores (N, labels) of about `count` base samples, a chunk of images at a time."""
    labels, parts, done, index = len(environment.labels), [], 0, 0
    while done < count:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        part = draw_samples(policy, environment, 1000, generator, tuned=False, batch_size=250, progress=False)
        parts.append(
            (digit_oracle(part.images), measure_stroke(part.images), part.prompt_rows, all_scores(environment, part.images))
        )
        done, index = done + 1000 * labels, index + 1
        print(f"base samples: {done} of {count}", flush=True)
    return dict(zip(("digit", "ink", "prompt", "scores"), (torch.cat(column) for column in zip(*parts, strict=True)), strict=True))


def exact_laws(base: dict[str, torch.Tensor], cells: torch.Tensor, label: int) -> torch.Tensor:
    """The conditional law of the cell given the label and each prompt, (prompts, cells); prompts are equally frequent."""
    rows_of = [base["prompt"] == prompt for prompt in base["prompt"].unique()]
    return torch.stack([histogram(cells[rows], base["scores"][rows, label].softmax(0)) for rows in rows_of])


def floor(laws: torch.Tensor, draws: Sequence[float], generator: torch.Generator, repeats: int = 200) -> float:
    """Mean distance to the laws' mean of the histograms of so many independent draws from each."""
    found = []
    for _ in range(repeats):
        parts = []
        for law, count in zip(laws, draws, strict=True):
            cells = torch.multinomial(law, max(1, round(count)), replacement=True, generator=generator)
            parts.append(histogram(cells, torch.ones(len(cells), dtype=torch.float64)))
        found.append(distance(torch.stack(parts).mean(0), laws.mean(0)))
    return sum(found) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", default="digits-stroke")
    parser.add_argument("--base_samples", type=int, default=50_000)
    parser.add_argument("--outputs", type=int, default=300, help="groups of the largest number of particles, for each label")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    task, _ = parse_arguments([])
    adapter = load_adapter(resolve_folder(args.adapter))
    policy, environment = adapter_environment(adapter, task)
    names = label_grid(adapter.label_encoder.label_space).names
    base = base_pool(policy, environment, args.base_samples, args.seed)
    edges = base["ink"].quantile(torch.arange(1, DECILES, dtype=torch.float64) / DECILES)
    base_cells = base["digit"] * DECILES + torch.bucketize(base["ink"], edges)
    laws = [exact_laws(base, base_cells, label) for label in range(len(names))]
    # the exact law is an estimate itself: how far its two halves are apart, halved, is about its own error
    half = torch.arange(len(base["digit"])) // environment.num_prompts % 2 == 0  # prompts take turns: whole rounds on each side
    halves = [{key: value[rows] for key, value in base.items()} for rows in (half, ~half)]
    own_error = [
        distance(exact_laws(halves[0], base_cells[half], y).mean(0), exact_laws(halves[1], base_cells[~half], y).mean(0)) / 2
        for y in range(len(names))
    ]
    with policy.merged():
        per_label = args.outputs * max(PARTICLES)
        generator = torch.Generator().manual_seed(args.seed + 7)
        tuned = draw_samples(policy, environment, per_label, generator, batch_size=250, description="tuned samples")
    cells = digit_oracle(tuned.images) * DECILES + torch.bucketize(measure_stroke(tuned.images), edges)
    log_weights = environment.gamma * tuned.log_likelihood - tuned.log_ratio
    generator, rows = torch.Generator().manual_seed(args.seed), []
    for n in PARTICLES:
        distances, floors, ess_share = [], [], []
        for label, of_prompts in enumerate(laws):
            counts, own = [], []
            for prompt in range(environment.num_prompts):
                chosen = ((tuned.label_rows == label) & (tuned.prompt_rows == prompt)).nonzero().flatten()
                groups = chosen[: len(chosen) // n * n].view(-1, n)
                share = log_weights[groups].softmax(dim=1)
                own.append(histogram(cells[groups].flatten(), share.flatten()))
                counts.append(effective_sample_size(log_weights[groups]).sum().item())
                ess_share.append(effective_sample_size(log_weights[groups]).mean().item() / n)
            distances.append(distance(torch.stack(own).mean(0), of_prompts.mean(0)))
            floors.append(floor(of_prompts, counts, generator))
        row = {
            "particles": n,
            "total_variation": sum(distances) / len(distances),
            "floor": sum(floors) / len(floors),
            "ess_share": sum(ess_share) / len(ess_share),
            "by_label": dict(zip(names, distances, strict=True)),
        }
        rows.append(row)
        print(
            f"n = {n:3}: TV {row['total_variation']:.4f}, noise floor {row['floor']:.4f}, ESS / n {row['ess_share']:.2f}",
            flush=True,
        )
    unlabelled = histogram(base_cells, torch.ones(len(base_cells), dtype=torch.float64))
    base_distance = [distance(unlabelled, of_prompts.mean(0)) for of_prompts in laws]
    result = {
        "rows": rows,
        "base": sum(base_distance) / len(base_distance),
        "exact_law_error": sum(own_error) / len(own_error),
        "base_samples": len(base_cells),
        "tuned_samples": len(cells),
        "adapter": args.adapter,
        "gap_from_base": adapter.config.metrics.get("gap_from_base"),
        "seed": args.seed,
        **provenance(),
    }
    output = RESULTS / "exact_sampling.json"
    write_json(output, result)
    plot(result, output.with_suffix(".png"))


def plot(result: dict, path: Path) -> None:
    """Distance and noise floor against the number of particles."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5.4, 3.6))
    particles = [row["particles"] for row in result["rows"]]
    axis.plot(particles, [row["total_variation"] for row in result["rows"]], "o-", color="#b3321b", label="exact sampling")
    axis.plot(particles, [row["floor"] for row in result["rows"]], "s--", color="#7083a8", label="noise floor")
    axis.axhline(result["base"], color="#999999", linestyle=":", label="base, no label")
    axis.set_xscale("log", base=2)
    axis.set_xticks(particles, [str(n) for n in particles])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("particles n")
    axis.set_ylabel("total variation to the exact law")
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
