"""Benchmark A: posteriors of a Gaussian mixture, known in closed form: -> benchmarks/results/gmm_posteriors.json and .png.

    pip install --no-deps azula==0.11.1 POT==0.9.7.post1 einops==0.8.2
    python benchmarks/gmm_posteriors.py [--seeds 27 1 2 3 4 5] [--rows 1 2 4] [--updates 50] [--refit_updates 400] [--plot_only]

(With its dependencies azula brings torchvision, which it does not import here; a build of it for another torch breaks `import peft`.)

One policy a problem (one y). Three phases, each certified and measured, so that it is seen what each one adds:
  gain   regression of the head on look-ahead (a) of gmm_problem.py with gain 1: a known guidance rule, nothing is learned from rewards yet;
  RL     `direct_backprop`, the library's objective, at gamma = 1;
  refit  exact sampling once, then denoising regression on what it draws: trajectories of the policy, resampled by their importance weights,
         noised again. Its optimum is the same control; unlike the RL gradient it also hears of modes that are visited too rarely.
Then 1,000 outputs, each one trajectory or one resampled out of 32 or 128 by the weights of `particles.py`. Metric: POT's max-sliced
Wasserstein-2 distance, 100 projections, 1,000 samples against 10,000 exact ones; `floor` is that of 1,000 exact samples.
Problems already in the results (with the same settings) are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from gmm_problem import GMMDenoiser, GMMProblem, geometric_scheduler, gmm_problem  # noqa: E402

from diffusers_ctrl import Categorical, LabelSpace, Policy  # noqa: E402
from diffusers_ctrl.evaluation import Samples, certificate, draw_samples, take  # noqa: E402
from diffusers_ctrl.objectives import direct_backprop  # noqa: E402
from diffusers_ctrl.particles import ParticlePool, effective_sample_size  # noqa: E402
from diffusers_ctrl.rollouts import Environment, Sampler, rollout  # noqa: E402
from records import provenance, save_figure, write_json  # noqa: E402


OUTPUTS, PARTICLES = 1000, (32, 128)
HIGH = 30.0  # noise / signal at the start
PUBLISHED = {  # stored results of the benchmark named in gmm_problem.py, ranges over repeats: 100 steps, eta 0.6, seed 27 of their torch
    "source": "github.com/gabrielvc/benchopts_inverse_problem_diffusion_prior, outputs of 2024-03-15",
    "1": {"DDRM": [26.9, 33.1], "DPS": [23.1, 29.2], "MCGdiff 32": [18.0, 23.8], "MCGdiff 128": [4.7, 5.8]},
    "2": {"DDRM": [11.7, 15.6], "DPS": [16.5, 20.4], "MCGdiff 32": [9.9, 12.4], "MCGdiff 128": [3.8, 4.7]},
    "4": {"DDRM": [0.43, 0.61], "DPS": [11.0, 14.1], "MCGdiff 32": [0.66, 1.22], "MCGdiff 128": [0.14, 0.20]},
}


def wasserstein(samples: Tensor, exact: Tensor, repeats: int = 2) -> float:
    """POT's max-sliced distance, mean over `repeats` fixed sets of 100 projections. samples: (1000, d), exact: (10000, d)."""
    from ot.sliced import max_sliced_wasserstein_distance

    found = [max_sliced_wasserstein_distance(exact, samples.double(), n_projections=100, seed=seed) for seed in range(repeats)]
    return sum(value.item() for value in found) / repeats


def residual(problem: GMMProblem, samples: Tensor) -> float:
    """Root mean square of (y − A x) / s. The distance hardly sees it where s is small; close to 1 for exact samples."""
    found = (problem.observation - samples.double() @ problem.matrix.T) / problem.noise
    return found.square().mean().sqrt().item()


def lowest_level(problem: GMMProblem) -> float:
    """Noise / signal of the last level: well below the narrowest width of the posterior, in units of the diffused state."""
    narrowest = problem.noise / math.hypot(problem.noise, torch.linalg.svdvals(problem.matrix).max().item())
    return min(0.012, max(2e-4, 0.4 * narrowest / problem.scale))


class Task:
    """A problem with its policy and its samplers."""

    def __init__(self, problem: GMMProblem, seed: int, width: int = 64, rank: int = 32) -> None:
        self.problem, self.low = problem, lowest_level(problem)
        self.generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.denoiser = GMMDenoiser(problem, self.scheduler(), width)
            space = LabelSpace(observation=Categorical(("this y", "another y")))
            self.policy = Policy(self.denoiser, label_space=space, lora_rank=rank, lora_targets=list(GMMDenoiser.HEAD_LAYERS))
        self.parameters = [p for group in self.policy.trainable_parameters().values() for p in group]

    def scheduler(self):
        return geometric_scheduler(self.low, HIGH)

    def environment(self, steps: int) -> Environment:
        sampler = Sampler(self.scheduler(), steps, {"eta": 1.0})
        return Environment(sampler, (self.problem.dimensions,), self.problem.log_likelihood, torch.tensor([[0.0]]))

    def draw(self, steps: int, count: int, generator: torch.Generator) -> Samples:
        """`count` trajectories of the tuned policy, in units of `scale`."""
        with self.policy.merged():
            return draw_samples(self.policy, self.environment(steps), count, generator, batch_size=2000, progress=False)


def descend(task: Task, updates: int, rate: float, loss_of, clip: float) -> None:
    """Adam on `loss_of()` with a short warm-up and a cosine to zero."""
    optimizer = torch.optim.Adam(task.parameters, lr=rate, betas=(0.9, 0.99))
    for update in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (update + 1) / 10) * 0.5 * (1 + math.cos(math.pi * update / updates))
        with task.policy.merged():
            loss = loss_of()
            optimizer.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(task.parameters, clip)
        optimizer.step()


def fit_gain(task: Task, steps: int, updates: int = 300) -> None:
    """Regresses the head on look-ahead (a), at states of base trajectories: no reward and no posterior sample enters."""
    environment, generator = task.environment(steps), task.generator
    batch = environment.draw(512, generator)
    states = rollout(task.policy, environment.sampler, batch, generator, tuned=False).states

    def loss() -> Tensor:
        k = int(torch.randint(len(environment.sampler.noisy_steps), (1,), generator=generator))
        t, z = environment.sampler.timesteps[k], states[k]
        a, b = task.denoiser.levels(t)
        target = -task.denoiser.features(task.denoiser.moments(z, a, b))[0] / b
        found = task.policy(z, t, batch.labels) - task.policy.reference(z, t)
        return (found - target).square().sum(dim=1).mean() / target.square().sum(dim=1).mean().clamp_min(1e-3)

    descend(task, updates, 5e-3, loss, clip=math.inf)


def train_by_reward(task: Task, steps: int, updates: int, batch_size: int, rate: float = 2e-3) -> None:
    """The library's `direct_backprop`: ascends E[log p(y | x)] − KL through all steps."""
    environment = task.environment(steps)

    def loss() -> Tensor:
        batch = environment.draw(batch_size, task.generator)
        return direct_backprop(task.policy, environment.sampler, batch, environment.log_likelihood, task.generator)[0]

    descend(task, updates, rate, loss, clip=1.0)


def refit(task: Task, steps: int, trajectories: int, updates: int, rate: float = 3e-3, rows: int = 256, levels: int = 4) -> None:
    """Denoising regression on the policy's own trajectories, drawn in proportion to their importance weights.

    At eta = 1 the exact law of z_t is the posterior's z_0 noised, so a weighted z_0 noised afresh is a state of the exact law, and
    a e − b z_0 an unbiased target of its velocity. The loss counts velocities as the KL of the steps does.
    """
    environment, generator = task.environment(steps), task.generator
    samples, sampler = task.draw(steps, trajectories, generator), environment.sampler
    weights = (samples.log_likelihood - samples.log_ratio).softmax(0)
    unit = torch.ones(1, task.problem.dimensions)
    pull = {}  # what a unit of velocity moves the step's mean, in standard deviations of the step
    for k in sampler.noisy_steps:
        step = sampler.transition(unit, sampler.timesteps[k], torch.zeros_like(unit))
        pull[k] = (step.mean[0, 0] / step.std).item()

    def loss() -> Tensor:
        chosen = torch.multinomial(weights, rows * levels, replacement=True, generator=generator)
        total = torch.zeros(())
        for part in chosen.split(rows):
            k = sampler.noisy_steps[int(torch.randint(len(sampler.noisy_steps), (1,), generator=generator))]
            a, b = task.denoiser.levels(sampler.timesteps[k])
            clean, noise = samples.images[part], torch.randn(rows, task.problem.dimensions, generator=generator)
            found = task.policy(a * clean + b * noise, sampler.timesteps[k], torch.zeros(rows, 1))
            total = total + pull[k] ** 2 * (found - (a * noise - b * clean)).square().sum(dim=1).mean() / (2 * levels)
        return total

    descend(task, updates, rate, loss, clip=5.0)


@dataclass
class Drawn:
    """What `ParticlePool` reads the other fields of a pipeline's output from: there are none."""

    images: Tensor


def resampled(states: Tensor, log_weights: Tensor, particles: int, seed: int) -> tuple[Tensor, float]:
    """(1000, n, d) states and (1000, n) log-weights -> (1000, d), one of the first `particles` of each row; and the mean ESS."""
    pool = ParticlePool(len(states), torch.Generator().manual_seed(seed))
    chosen, weights = states[:, :particles].flatten(0, 1), log_weights[:, :particles].flatten()
    pool.add(chosen, weights, Drawn(chosen))
    return pool.images, effective_sample_size(log_weights[:, :particles]).mean().item()


def certified(samples: Samples, rows: int = 20_000) -> dict[str, float]:
    """The library's certificate at gamma = 1 of the first `rows` trajectories: nats, and the ESS as a share."""
    part = take(samples, torch.arange(min(rows, len(samples.kl))))
    found = certificate(part, 1.0)
    names = ("objective", "log_partition", "log_partition_se", "gap", "gap_se")
    return {name: round(getattr(found, name), 4) for name in names} | {"ess_share": found.ess / len(part.kl)}


def run_problem(seed: int, d_y: int, args: argparse.Namespace) -> dict:
    """One row of the results: floor, CTRL after each phase, particles, peers."""
    problem = gmm_problem(seed, d_y)
    exact = problem.exact_samples(10_000, seed=0)
    floors = torch.tensor([wasserstein(problem.exact_samples(OUTPUTS, seed=1 + i), exact) for i in range(6)])
    row = {
        "seed": seed,
        "d_y": d_y,
        "noise": problem.noise,
        "singular_values": torch.linalg.svdvals(problem.matrix).tolist(),
        "mode_weights": problem.posterior.mixture_distribution.probs.sort(descending=True).values[:5].tolist(),
        "log_partition": problem.log_partition,
        "floor": floors.mean().item(),
        "floor_sd": floors.std().item(),
        "residual": residual(problem, exact),
        "methods": {},
        "phases": {},
    }
    kept: dict[str, Tensor] = {}

    def record(name: str, samples: Tensor, calls: int, seconds: float, **more: float) -> None:
        kept[name] = samples
        figures = {"wasserstein": wasserstein(samples, exact), "residual": residual(problem, samples)}
        row["methods"][name] = figures | {"calls": calls, "seconds": round(seconds, 2), **more}

    task = Task(problem, seed)
    phases = {
        "gain": lambda: fit_gain(task, args.train_steps),
        "RL": lambda: train_by_reward(task, args.train_steps, args.updates, args.batch_size),
        "refit": lambda: refit(task, args.steps, args.refit_trajectories, args.refit_updates),
    }
    for name, phase in phases.items():
        started = time.perf_counter()
        phase()
        seconds = time.perf_counter() - started
        samples = task.draw(args.steps, 4000, torch.Generator().manual_seed(seed + 7))
        row["phases"][name] = certified(samples) | {"seconds": round(seconds, 1)}
        if name != "refit":
            drawn = time.perf_counter() - started - seconds
            record(f"CTRL after {name}, single draw", problem.scale * samples.images[:OUTPUTS], args.steps, drawn / 4)
    started = time.perf_counter()
    samples = task.draw(args.steps, OUTPUTS * max(PARTICLES), torch.Generator().manual_seed(seed + 11))
    seconds = time.perf_counter() - started
    row["certificate"] = certified(samples)
    states = (problem.scale * samples.images).view(OUTPUTS, max(PARTICLES), -1)
    log_weights = (samples.log_likelihood - samples.log_ratio).view(OUTPUTS, -1)
    record("CTRL single draw", states[:, 0], args.steps, seconds / max(PARTICLES))
    for n in PARTICLES:
        # tuned and base are both called: the weights need the base
        found, ess = resampled(states, log_weights, n, seed)
        record(f"CTRL {n} particles", found, 2 * n * args.steps, seconds * n / max(PARTICLES), ess=ess)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 13)
        prior = problem.prior.sample((OUTPUTS, max(PARTICLES)))
    flat = problem.log_likelihood(prior.flatten(0, 1) / problem.scale).view(OUTPUTS, -1)
    found, ess = resampled(prior, flat, max(PARTICLES), seed)
    record(f"untrained: {max(PARTICLES)} exact prior draws", found, max(PARTICLES) * args.steps, 0.0, ess=ess)
    if not args.no_peers:
        from gmm_peers import run_peers

        for name, peer in run_peers(problem, task.denoiser, task.low, HIGH, args.steps, seed).items():
            record(name, peer["samples"], peer["calls"], peer["seconds"], not_finite=peer["not_finite"])
    if seed == 27 and d_y == 1:
        # the plane that the means lie in: the means of the even and of the odd coordinates
        shown = {"exact": exact, "CTRL single draw": kept["CTRL single draw"], **{n: kept[n] for n in kept if n == "DPS zeta 1"}}
        row["plane"] = {
            name: torch.stack([x[:300, 0::2].mean(1), x[:300, 1::2].mean(1)], 1).double().mul(100).round().div(100).tolist()
            for name, x in shown.items()
        }
    return row


def tables(rows: list[dict], d_y: int) -> dict[str, list[float]]:
    """method -> its distances over the seeds of a row, the floor first. Of DPS the strength that is best on each problem is added."""
    chosen = [row for row in rows if row["d_y"] == d_y]
    found: dict[str, list[float]] = {"floor": [row["floor"] for row in chosen]}
    for row in chosen:
        values = {name: method["wasserstein"] for name, method in row["methods"].items()}
        dps = [value for name, value in values.items() if name.startswith("DPS zeta")]
        for name, value in (values | ({"DPS, best zeta": min(dps)} if dps else {})).items():
            found.setdefault(name, []).append(value)
    return found


def plot(results: dict, path: Path) -> None:
    """Distances of every problem (log axis) against the floor and the published ranges; one problem's samples in the means' plane."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    rows = results["rows"]
    dims = sorted({row["d_y"] for row in rows})
    methods = {
        "DPS, published settings": "DPS, their settings (here)",
        "DPS zeta 1": "DPS, eta 1, CTRL's levels (here)",
        "TMPD": "TMPD (here)",
        "MMPS": "MMPS (here)",
        "TDS 32000 particles in one filter": "TDS, 32,000 particles (here)",
        "untrained: 128 exact prior draws": "128 prior draws, reweighted",
        "CTRL after RL, single draw": "CTRL before refit, single draw",
        "CTRL single draw": "CTRL, single draw",
        "CTRL 32 particles": "CTRL, 32 particles",
        "CTRL 128 particles": "CTRL, 128 particles",
    }
    published = ["DDRM", "DPS", "MCGdiff 32", "MCGdiff 128"]
    names = [f"{name} (published)" for name in published] + list(methods.values())
    figure, axes = plt.subplots(2, 2, figsize=(12.5, 8.6), layout="constrained")
    axes = axes.flatten()
    for axis, d_y in zip(axes, dims, strict=False):
        table = tables(rows, d_y)
        for place, name in enumerate(published):
            low, high = PUBLISHED[str(d_y)][name]
            axis.plot([low, high], [place, place], color="#444444", lw=5, solid_capstyle="butt")
        for place, name in enumerate(methods, start=len(published)):
            color = "#b3321b" if name.startswith("CTRL") else "#7083a8"
            for row in rows:
                if row["d_y"] == d_y and name in row["methods"]:
                    theirs = row["seed"] == 27
                    value = row["methods"][name]["wasserstein"]
                    axis.plot(
                        value, place, "D" if theirs else "o", ms=7 if theirs else 4.5, color=color, mfc=color if theirs else "none"
                    )
        for row in rows:
            if row["d_y"] == d_y:
                axis.axvline(
                    row["floor"], color="#2a8c4a", lw=1.6 if row["seed"] == 27 else 0.6, ls="-" if row["seed"] == 27 else ":"
                )
        axis.set_xscale("log")
        ticks = [tick for tick in (0.1, 0.3, 1, 3, 10, 30, 100) if axis.get_xlim()[0] < tick < axis.get_xlim()[1]]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.invert_yaxis()
        axis.grid(axis="x", which="both", alpha=0.2)
        axis.set_title(f"d_y = {d_y}, d_x = 8 ({len(table['floor'])} seeds)", fontsize=10)
        axis.set_xlabel("max-sliced Wasserstein distance", fontsize=9)
    axes[0].plot([], [], "D", color="#444444", label="seed 27")
    axes[0].plot([], [], "o", color="#444444", mfc="none", label="other seeds")
    axes[0].plot([], [], color="#2a8c4a", label="floor: exact samples")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    planes = [row["plane"] for row in rows if "plane" in row]
    if planes:
        for (name, points), style in zip(planes[0].items(), (("o", "#2a8c4a"), ("x", "#b3321b"), ("+", "#7083a8")), strict=False):
            x, y = zip(*points, strict=True)
            axes[-1].plot(x, y, style[0], ms=4, alpha=0.5, color=style[1], mfc="none", label=name)
        axes[-1].legend(fontsize=8, loc="center right")
        axes[-1].set_title("seed 27, d_y = 1: means of even, odd coordinates", fontsize=10)
        axes[-1].set_aspect("equal", adjustable="datalim")
    save_figure(figure, path, dpi=120)


def summary(results: dict) -> str:
    """One Markdown table: mean ± standard deviation over the seeds, and seed 27."""
    rows = results["rows"]
    dims = sorted({row["d_y"] for row in rows})
    names = list(dict.fromkeys(name for d_y in dims for name in tables(rows, d_y)))
    lines = ["| method | " + " | ".join(f"({d_y}, 8): mean ± sd; seed 27" for d_y in dims) + " |", "| --- |" + " --- |" * len(dims)]
    for name in names:
        cells = []
        for d_y in dims:
            values = torch.tensor(tables(rows, d_y).get(name, [math.nan]))
            theirs = (tables([row for row in rows if row["seed"] == 27], d_y).get(name) or [math.nan])[0]
            cells.append(f"{values.mean():.2f} ± {values.std(correction=0):.2f}; {theirs:.2f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[27, 1, 2, 3, 4, 5])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4], help="d_y")
    parser.add_argument("--steps", type=int, default=100, help="K of what is measured")
    parser.add_argument("--train_steps", type=int, default=50, help="K of gain and RL; what is learned carries over")
    parser.add_argument("--updates", type=int, default=50, help="of RL")
    parser.add_argument("--batch_size", type=int, default=256, help="trajectories of an RL update")
    parser.add_argument("--refit_trajectories", type=int, default=16_000)
    parser.add_argument("--refit_updates", type=int, default=400)
    parser.add_argument("--no_peers", action="store_true", help="without azula")
    parser.add_argument("--plot_only", action="store_true")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gmm_posteriors.json")
    args = parser.parse_args()
    settings = {k: v for k, v in vars(args).items() if k not in ("seeds", "rows", "output", "plot_only")}
    if args.output.exists():
        results = json.loads(args.output.read_text())
        if results["settings"] != settings and not args.plot_only:
            raise SystemExit(f"{args.output} was made with {results['settings']}: give another --output, or remove it.")
    else:
        own = provenance()
        own["versions"] |= {name: version(name) for name in ("azula", "POT") if not args.no_peers or name == "POT"}
        results = {
            "note": "wasserstein: POT's max-sliced distance of 1,000 outputs to 10,000 exact samples. calls: of the denoiser, an output. "
            "seconds: for the 1,000 outputs, one thread, other jobs beside it. nats: objective, log_partition, gap.",
            **own,
            "threads": 1,
            "settings": settings,
            "published": PUBLISHED,
            "rows": [],
        }
    torch.set_num_threads(1)
    done = {(row["seed"], row["d_y"]) for row in results["rows"]}
    for seed in [] if args.plot_only else args.seeds:
        for d_y in args.rows:
            if (seed, d_y) in done:
                continue
            started = time.perf_counter()
            row = run_problem(seed, d_y, args)
            row["seconds"] = round(time.perf_counter() - started, 1)
            results["rows"].append(row)
            write_json(args.output, results)
            gaps = ", ".join(f"{name} {phase['gap']:.2f}" for name, phase in row["phases"].items())
            figures = ", ".join(f"{name} {method['wasserstein']:.2f}" for name, method in row["methods"].items())
            print(f"seed {seed} d_y {d_y} ({row['seconds']} s): gaps {gaps}; floor {row['floor']:.2f}; {figures}", flush=True)
    plot(results, args.output.with_suffix(".png"))
    print(summary(results))


if __name__ == "__main__":
    main()
