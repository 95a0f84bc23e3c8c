"""How should the memoryless SDE of a flow be stepped? -> benchmarks/results/flow_steps.json

    python benchmarks/flow_steps.py [--steps 8 16 32] [--samples 200000] [--seed 0]

Four ways, on flows whose velocity is known, K steps from 1 to 1/K and to 0:

    posterior   the next state's exact law given the state and the estimated clean sample: MemorylessFlowMatchScheduler
    euler       Euler's method on the SDE of arXiv 2409.08861, mean x + h (u + eta·score) and variance 2 h eta, made finite at t = 0 by
                eta = (1 − t + h) / (t + h)
    renoise     FlowMatchEulerDiscreteScheduler's stochastic_sampling
    ode         FlowMatchEulerDiscreteScheduler, without noise

and three questions. distance: the Wasserstein distance of x_K to a mixture of three Gaussians, in one dimension. noise: the std of the states
over what the schedule says, the largest over the steps, for data at one point, which is what a denoiser is shown. unreachable: log Z − max J in
nats for a Gaussian prior and likelihood, which no control of steps with the base's variance can reach. correlation: of x_0 and x_K.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from records import RESULTS, provenance, write_json  # noqa: E402

from diffusers_ctrl.schedulers import posterior_coefficients  # noqa: E402
from problems import best_objective, exact_log_partition  # noqa: E402


WEIGHTS, MEANS, STDS = (torch.tensor(v, dtype=torch.float64) for v in ([0.2, 0.5, 0.3], [-1.0, 0.3, 1.2], [0.15, 0.25, 0.1]))
PRIOR = (0.3, 0.8)  # of the problem with a likelihood: its mean and standard deviation
OBSERVATION, LIKELIHOODS = 1.0, (0.6, 0.2)
METHODS = ("posterior", "euler", "renoise", "ode")


def coefficients(method: str, s: float, s_next: float) -> tuple[float, float, float]:
    """Weights of the clean estimate and of the state in the next state's mean, and its std."""
    if method == "renoise":
        return 1 - s_next, 0.0, s_next
    if method == "ode" or s_next == 0:  # the last step is the clean sample's for all
        return 1 - s_next / s, s_next / s, 0.0
    if method == "posterior":
        return posterior_coefficients((1 - s, s), (1 - s_next, s_next))
    # u = (clean − x) / s is the velocity towards the data, score = −(x − (1 − s)·clean) / s²
    h = s - s_next
    eta = (s + h) / (1 - s_next)
    return h / s + h * eta * (1 - s) / s**2, 1 - h / s - h * eta / s**2, math.sqrt(2 * h * eta)


def clean_estimate(x: torch.Tensor, s: float) -> torch.Tensor:
    """E[clean | x] of the mixture, (N,) -> (N,)."""
    a = 1 - s
    variance = a**2 * STDS**2 + s**2
    away = x.unsqueeze(1) - a * MEANS
    share = (WEIGHTS.log() - away**2 / (2 * variance) - variance.log() / 2).softmax(1)
    return (share * (MEANS + a * STDS**2 / variance * away)).sum(1)


def sample(method: str, sigmas: list[float], count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_0, x_K), (count,) each."""
    start = x = torch.randn(count, generator=generator, dtype=torch.float64)
    for s, s_next in zip(sigmas, sigmas[1:], strict=False):
        clean_weight, state_weight, std = coefficients(method, s, s_next)
        x = (
            clean_weight * clean_estimate(x, s)
            + state_weight * x
            + std * torch.randn(count, generator=generator, dtype=torch.float64)
        )
    return start, x


def distance(x: torch.Tensor, generator: torch.Generator) -> float:
    """Wasserstein-1 to as many exact draws, by order statistics."""
    modes = torch.multinomial(WEIGHTS, len(x), replacement=True, generator=generator)
    exact = MEANS[modes] + STDS[modes] * torch.randn(len(x), generator=generator, dtype=torch.float64)
    return (x.sort().values - exact.sort().values).abs().mean().item()


def affine(method: str, sigmas: list[float]) -> list[tuple[float, float, float]]:
    """(slope, shift, sigma) of each base step for the Gaussian prior."""
    steps = []
    for s, s_next in zip(sigmas, sigmas[1:], strict=False):
        clean_weight, state_weight, std = coefficients(method, s, s_next)
        a, (mean, prior) = 1 - s, PRIOR
        slope = a * prior**2 / (a**2 * prior**2 + s**2)
        steps.append((clean_weight * slope + state_weight, clean_weight * (1 - slope * a) * mean, std))
    return steps


def largest_noise(method: str, sigmas: list[float]) -> float:
    """Std of the states over the schedule's, where the clean sample is 0 for certain."""
    std, ratios = 1.0, []
    for s, s_next in zip(sigmas[:-1], sigmas[1:-1], strict=False):
        _, state_weight, fresh = coefficients(method, s, s_next)
        std = math.hypot(state_weight * std, fresh)
        ratios.append(std / s_next)
    return max(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "flow_steps.json")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(args.seed)
    modes = torch.multinomial(WEIGHTS, args.samples, replacement=True, generator=generator)
    exact = MEANS[modes] + STDS[modes] * torch.randn(args.samples, generator=generator, dtype=torch.float64)
    results = {
        **provenance(),
        "seed": args.seed,
        "samples": args.samples,
        "distance_of_exact_draws": distance(exact, generator),
        "rows": [],
    }
    for steps in args.steps:
        sigmas = [*torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist(), 0.0]
        for method in METHODS:
            start, end = sample(method, sigmas, args.samples, generator)
            row = {
                "steps": steps,
                "method": method,
                "distance": distance(end, generator),
                "noise": largest_noise(method, sigmas),
                "correlation": torch.corrcoef(torch.stack([start, end]))[0, 1].item(),
            }
            if method != "ode":
                path = affine(method, sigmas)
                for noise in LIKELIHOODS:
                    row[f"unreachable.{noise:g}"] = exact_log_partition(path, OBSERVATION, noise) - best_objective(
                        path, OBSERVATION, noise
                    )
            results["rows"].append(row)
            print("  ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    write_json(args.output, results)


if __name__ == "__main__":
    main()
