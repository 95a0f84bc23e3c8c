"""Training-free posterior samplers from azula (https://github.com/probabilists/azula) on the mixture's exact denoiser.

Everything that is not the method is CTRL's: the same exact denoiser, the same states in units of `scale`, the same K noise levels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from azula.denoise import Denoiser, DiracPosterior
from azula.guidance.dps import DPSSampler
from azula.guidance.mmps import MMPSDenoiser
from azula.guidance.tds import TDSSampler
from azula.guidance.tmpd import TMPDenoiser
from azula.noise import Schedule
from azula.sample import DDPMSampler
from gmm_problem import GMMDenoiser, GMMProblem
from torch import Tensor


DPS_STRENGTHS = (0.3, 1.0, 3.0)  # 1 is the published benchmark's
TDS_PARTICLES = (1_000, 32_000)


class GeometricSchedule(Schedule):
    """Noise / signal from `low` (t = 0) to `high` (t = 1) in equal ratios, variance preserving."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        ratio = self.low * (self.high / self.low) ** t
        alpha = 1 / (1 + ratio.square()).sqrt()
        return alpha, ratio * alpha


class MixtureDenoiser(Denoiser):
    """E[z_0 | z_t] of the mixture, exact, for azula's samplers."""

    def __init__(self, denoiser: GMMDenoiser, schedule: Schedule) -> None:
        super().__init__()
        self.denoiser, self.schedule = denoiser, schedule

    def forward(self, x_t: Tensor, t: Tensor, **kwargs) -> DiracPosterior:
        a, b = (value.item() for value in self.schedule(t))
        return DiracPosterior(mean=self.denoiser.moments(x_t, a, b).clean)


def peer_samplers(
    problem: GMMProblem, denoiser: GMMDenoiser, low: float, high: float, steps: int
) -> dict[str, tuple[Callable, int]]:
    """name -> (a function of no arguments returning (1000, d) states in units of `scale`, network calls an output)."""
    prior = MixtureDenoiser(denoiser, GeometricSchedule(low, high))
    settings = {"steps": steps, "silent": True}
    forward, label = denoiser.map, denoiser.label  # in standard deviations of the label's noise, whose variance is then 1

    def distance(clean: Tensor) -> Tensor:
        # azula's DPS takes one norm over the batch; fed with Σ_i ‖y − A x_i‖ it follows the gradient of each sample's own norm
        return problem.noise * torch.linalg.vector_norm(label - clean @ forward.T, dim=1).sum()

    def twist(clean: Tensor, ratio: Tensor) -> Tensor:
        """log N(label; map · clean, I + r² map mapᵀ) up to a constant of t, (B,), r² that of a prior of unit variance (as ΠGDM)."""
        covariance = torch.eye(len(forward)) + (ratio**2 / (1 + ratio**2)) * forward @ forward.T
        residual = label - clean @ forward.T
        return -(residual * torch.linalg.solve(covariance, residual.T).T).sum(dim=1) / 2

    def start(count: int) -> Tensor:
        return torch.randn(count, problem.dimensions)

    def tds(particles: int) -> Tensor:
        found = TDSSampler(prior, twist, **settings)(start(particles))
        return found[torch.randperm(particles)[:1000]]

    def measured(clean: Tensor) -> Tensor:
        return clean @ forward.T

    samplers: dict[str, tuple[Callable, int]] = {}
    for zeta in DPS_STRENGTHS:
        # the published guidance acts on x: on z = x / scale both the gradient and the unit bring a factor
        dps = DPSSampler(prior, torch.zeros(()), distance, zeta / problem.scale**2, **settings)
        samplers[f"DPS zeta {zeta:g}"] = (lambda dps=dps: dps(start(1000)), steps)
    tmpd = TMPDenoiser(prior, label, measured, torch.ones(()))
    mmps = MMPSDenoiser(prior, label, measured, lambda v: v, iterations=len(forward))
    samplers["TMPD"] = (lambda: DDPMSampler(tmpd, **settings)(start(1000)), steps)
    samplers["MMPS"] = (lambda: DDPMSampler(mmps, **settings)(start(1000)), steps)
    for count in TDS_PARTICLES:
        samplers[f"TDS {count} particles in one filter"] = (lambda count=count: tds(count), steps * count // 1000)
    return samplers


def published_dps(problem: GMMProblem, seed: int, steps: int = 100, eta: float = 0.6, zeta: float = 1.0) -> Tensor:
    """DPS with the published benchmark's settings, on x itself: 1,000 levels from its betas, every tenth used. (1000, d) as x.

    A check of the instance and of the metric: its distances are in the stored results, PUBLISHED in gmm_posteriors.py.
    """
    alphas = torch.cat([torch.ones(1), 1 - torch.linspace(0.02, 1e-4, 999)]).double().cumprod(0)
    levels = alphas[torch.linspace(0, 999, steps).long()].tolist()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        x = torch.randn(1000, problem.dimensions, dtype=torch.float64)
        for alpha, following in zip(levels[:0:-1], levels[-2::-1], strict=True):
            x = x.requires_grad_()
            # components have unit variance at every level
            distance = (x.unsqueeze(1) - math.sqrt(alpha) * problem.means).square().sum(dim=2)
            shares = (problem.weights.log() - distance / 2).softmax(dim=1)
            clean = math.sqrt(alpha) * x + (1 - alpha) * (shares @ problem.means)
            norm = torch.linalg.vector_norm(problem.observation - clean @ problem.matrix.T, dim=1)
            (pull,) = torch.autograd.grad(norm.sum(), x)
            variance = (1 - following) / (1 - alpha) * (1 - alpha / following)
            mean = math.sqrt(alpha) * ((1 - following) / (1 - alpha) * x + (1 - alpha / following) / (1 - alpha) * clean)
            # their step is the gradient of the squared norm over the norm: twice the norm's gradient
            x = (mean - 2 * zeta * pull + eta * math.sqrt(variance) * torch.randn_like(x)).detach()
    return x


def run_peers(problem: GMMProblem, denoiser: GMMDenoiser, low: float, high: float, steps: int, seed: int) -> dict[str, dict]:
    """name -> {samples (1000, d) as x, calls an output, seconds}. A sample that is not finite is replaced by the prior's mean."""
    found = {}
    for name, (sample, calls) in peer_samplers(problem, denoiser, low, high, steps).items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            started = time.perf_counter()
            z = sample()
        bad = ~torch.isfinite(z).all(dim=1)
        x = problem.scale * z.double()
        x[bad] = problem.weights @ problem.means
        seconds = time.perf_counter() - started
        found[name] = {"samples": x, "calls": calls, "seconds": seconds, "not_finite": int(bad.sum())}
    started = time.perf_counter()
    x = published_dps(problem, seed)
    found["DPS, published settings"] = {"samples": x, "calls": 99, "seconds": time.perf_counter() - started, "not_finite": 0}
    return found
