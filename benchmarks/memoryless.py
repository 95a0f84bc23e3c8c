"""What eta < 1 costs even the best possible control: -> benchmarks/results/memoryless.json and .png.

    python benchmarks/memoryless.py [--starts 1000] [--continuations 256] [--steps 20 50] [--seed 0]

No control changes where a trajectory starts: x_0 stays N(0, I). The path law that maximises E[log p(y | x_K)] − KL is therefore

    p*(x_0, …, x_K) = N(x_0; 0, I) · p_pre(x_1, …, x_K | x_0) · p(y | x_K) / h_0(x_0),    h_0(x_0) = E_pre[p(y | x_K) | x_0],

which reweights the base's continuations within each x_0. Bayes' posterior p_pre(x_K) p(y | x_K) / Z reweights them over all x_0 at once.
The two agree if h_0 is constant, so for every label only if x_0 tells nothing about x_K: if the sampler is memoryless (arXiv 2409.08861).
The difference of the two laws is measured here on a mixture of Gaussians whose denoiser is known, hence without training anything.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from numpy.polynomial.hermite_e import hermegauss


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from diffusers_ctrl.rollouts import Sampler, start_noise  # noqa: E402
from problems import cosine_scheduler  # noqa: E402
from records import RESULTS, provenance, save_figure, write_json  # noqa: E402


ETAS = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0)
NAMES = ("left", "right", "top", "x1", "x2")  # what is measured: the probability of each mode, then the mean of each coordinate
SLOPE, SHIFT = 3.0, -1.0  # of the label's logit in x2: the base puts 0.2 on the mode that the label favours, the posterior 0.7


@dataclass(frozen=True)
class Mixture:
    """Σ_m weights_m N(means_m, std² I) in 2-D, and what a perfect denoiser knows of it. weights: (M,), means: (M, 2)."""

    weights: torch.Tensor
    means: torch.Tensor
    std: float

    def responsibilities(self, x: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
        """p(m | x) where x = √alpha · clean + √(1 − alpha) · noise: (B, 2) -> (B, M). alpha = 1 is the clean sample."""
        variance = alpha * self.std**2 + 1 - alpha
        distance = (x.unsqueeze(1) - math.sqrt(alpha) * self.means).square().sum(dim=2)
        return (self.weights.log() - distance / (2 * variance)).softmax(dim=1)

    def velocity(self, x: torch.Tensor, alpha: float) -> torch.Tensor:
        """The exact v-prediction √alpha · E[noise | x] − √(1 − alpha) · E[clean | x], (B, 2) -> (B, 2). Needs alpha < 1."""
        a, gain = math.sqrt(alpha), math.sqrt(alpha) * self.std**2 / (alpha * self.std**2 + 1 - alpha)
        # E[clean | x, m] = mean_m + gain (x − a mean_m), averaged over m
        clean = gain * x + (1 - gain * a) * (self.responsibilities(x, alpha) @ self.means)
        return (a * x - clean) / math.sqrt(1 - alpha)

    def values(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 2) -> (B, M + 2): a function whose mean holds each mode's probability, then the mean of x."""
        return torch.cat([self.responsibilities(x), x], dim=1)


def three_modes() -> Mixture:
    """The problem of the figure, in float64: three well-separated modes, the rarest one at the top."""
    means = torch.tensor([[-1.0, -0.5], [1.0, -0.5], [0.0, 1.0]], dtype=torch.float64)
    return Mixture(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), means, 0.25)


def label_log_likelihood(x: torch.Tensor) -> torch.Tensor:
    """log p(y | x) of a label that likes the top, (B, 2) -> (B,) nats."""
    return torch.nn.functional.logsigmoid(SLOPE * x[:, 1] + SHIFT)


def known_laws(mixture: Mixture, nodes: int = 80) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of `mixture.values`, (M + 2,), under the mixture itself and under its posterior given the label: K = ∞, by quadrature."""
    z, rule = (torch.from_numpy(part) for part in hermegauss(nodes))
    rule = rule / rule.sum()
    base = torch.cat([mixture.weights, mixture.weights @ mixture.means])
    mass, mean = [], []
    for weight, center in zip(mixture.weights, mixture.means, strict=True):
        points = torch.stack([center[0].expand(nodes), center[1] + mixture.std * z], dim=1)  # the label depends on x2 alone
        density = weight * rule * label_log_likelihood(points).exp()
        mass.append(density.sum())
        mean.append(density @ points)
    mass = torch.stack(mass)
    return base, torch.cat([mass, torch.stack(mean).sum(dim=0)]) / mass.sum()


@torch.no_grad()
def continuations(
    mixture: Mixture, sampler: Sampler, starts: int, per_start: int, generator: torch.Generator, rows: int = 1 << 15
) -> torch.Tensor:
    """x_K of the base, (starts, per_start, 2): each x_0 is continued `per_start` times. `rows` trajectories run at once."""
    noise = start_noise((starts, 2), sampler, generator, torch.float64)
    ends = []
    for part in noise.split(max(1, rows // per_start)):
        x = part.repeat_interleave(per_start, dim=0)
        for t in sampler.timesteps:
            alpha = sampler.scheduler.alphas_cumprod[t].item()
            step = sampler.transition(mixture.velocity(x, alpha), t, x)
            x = step.mean if step.is_deterministic else step.sample(generator)
        ends.append(x.view(len(part), per_start, 2))
    return torch.cat(ends)


@dataclass(frozen=True)
class Laws:
    """Means of F functions of x_K under three laws, each (F,). Standard errors are over the starts.

    base: under p_pre. exact: under p_pre p(y | x) / Z. bias: under the optimum of the control problem, minus `exact`; its error
    is of the difference, for which both share their samples. correction: what the jackknife moved the optimum by.
    """

    base: torch.Tensor
    exact: torch.Tensor
    exact_se: torch.Tensor
    bias: torch.Tensor
    bias_se: torch.Tensor
    correction: torch.Tensor


def compare(values: torch.Tensor, log_likelihood: torch.Tensor) -> Laws:
    """Reweights base continuations within each start (the optimum) and over all of them (the exact posterior).

    A ratio of n-sample means is off by O(1/n). Over all starts n is large; within a start it is not, so each start's ratio is
    jackknifed (Quenouille), which leaves O(1/n²). At eta = 1 and K = 20 the mode's probability is off by 0.005 without it at n = 128,
    and with it by 0.01 at n = 16, 0.0007 at 64 and less than 0.0001 at 256, which is no more than the errors reported.

    Args:
        values: (S, n, F), functions of x_K of n continuations of each of S starts.
        log_likelihood: log p(y | x_K), (S, n) nats.
    """
    starts, n, _ = values.shape
    weights = (log_likelihood - log_likelihood.max()).exp().unsqueeze(2)
    top, bottom = (weights * values).sum(dim=1), weights.sum(dim=1)
    plain = top / bottom
    without_one = (top.unsqueeze(1) - weights * values) / (bottom.unsqueeze(1) - weights)
    within = n * plain - (n - 1) * without_one.mean(dim=1)
    exact = top.sum(dim=0) / bottom.sum()
    # linearised, one term a start: the ratio over all starts moves by h_0 / Z times that start's own deviation
    moves_exact = bottom / bottom.mean() * (plain - exact)
    moves_bias = within - moves_exact
    return Laws(
        base=values.mean(dim=(0, 1)),
        exact=exact,
        exact_se=moves_exact.std(dim=0) / math.sqrt(starts),
        bias=within.mean(dim=0) - exact,
        bias_se=moves_bias.std(dim=0) / math.sqrt(starts),
        correction=(within - plain).mean(dim=0),
    )


def measure(mixture: Mixture, eta: float, steps: int, starts: int, per_start: int, seed: int) -> Laws:
    """The laws of `mixture.values(x_K)` with DDIM at `eta` and K = `steps`. One seed is one set of starts, whatever eta and K."""
    sampler = Sampler(cosine_scheduler(), steps, {"eta": eta})
    ends = continuations(mixture, sampler, starts, per_start, torch.Generator().manual_seed(seed))
    flat = ends.flatten(0, 1)
    return compare(mixture.values(flat).view(starts, per_start, -1), label_log_likelihood(flat).view(starts, per_start))


def named(values: torch.Tensor) -> dict[str, float]:
    """(F,) -> numbers by name, rounded far below their errors."""
    return {name: round(value, 6) for name, value in zip(NAMES, values.tolist(), strict=True)}


def plot(results: dict, path: Path) -> None:
    """Bias against eta with error bars of two standard errors: of the favoured mode's probability, and of the mean along the label."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2))
    titles = {"top": "probability of the label's mode", "x2": "mean of x₂"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for steps, color in zip(results["steps"], ("#08519c", "#e6550d", "#31a354", "#756bb1"), strict=False):
            rows = [row for row in results["rows"] if row["steps"] == steps]
            bias, error = [row["bias"][name] for row in rows], [2 * row["bias_se"][name] for row in rows]
            axis.errorbar(
                [row["eta"] for row in rows],
                bias,
                error,
                fmt="o-",
                ms=4,
                lw=1.2,
                capsize=3,
                color=color,
                label=f"K = {steps}, ± 2 standard errors",
            )
        axis.axhline(0.0, color="black", lw=0.8)
        unmoved = results["mixture"][name] - results["posterior"][name]
        axis.axhline(unmoved, color="#888888", ls="--", lw=1, label="the base itself: control does nothing (eta → 0)")
        axis.set(title=f"{title} (posterior: {results['posterior'][name]:.2f})", xlabel="DDIM's eta", xticks=ETAS)
    axes[0].set_ylabel("bias: optimum − exact posterior")
    axes[0].legend(fontsize=8, loc="center right")
    figure.tight_layout()
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=1000, help="x_0 drawn")
    parser.add_argument("--continuations", type=int, default=256, help="trajectories from each x_0")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50], help="K, one curve each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "memoryless.json")
    args = parser.parse_args()
    mixture = three_modes()
    base, posterior = known_laws(mixture)
    results = {
        "note": "bias = law of x_K at the optimum of the control problem − p_pre(x) p(y|x) / Z of the same K-step base. left, right, top: "
        "probabilities of the modes; x1, x2: means. _se: one standard error, over starts. mixture, posterior: K = ∞, by quadrature.",
        **provenance(),
        "threads": torch.get_num_threads(),
        "seed": args.seed,
        "starts": args.starts,
        "continuations": args.continuations,
        "steps": args.steps,
        "mixture": named(base),
        "posterior": named(posterior),
        "rows": [],
    }
    for steps in args.steps:
        for eta in ETAS:
            started = time.perf_counter()
            laws = measure(mixture, eta, steps, args.starts, args.continuations, args.seed)
            row = {"steps": steps, "eta": eta, "seconds": round(time.perf_counter() - started, 1)}
            row |= {name: named(value) for name, value in vars(laws).items()}
            row["discretisation"] = named(laws.exact - posterior)
            results["rows"].append(row)
            print(
                f"K {steps:3}  eta {eta:.1f}  bias: top {row['bias']['top']:+.4f} ± {row['bias_se']['top']:.4f}  x2 "
                f"{row['bias']['x2']:+.4f} ± {row['bias_se']['x2']:.4f}  exact: top {row['exact']['top']:.4f} ± "
                f"{row['exact_se']['top']:.4f} (K = ∞: {posterior[2]:.4f})  {row['seconds']} s",
                flush=True,
            )
    write_json(args.output, results)
    plot(results, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
