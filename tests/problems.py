"""Analytic problems with known answers: a Gaussian prior and a Gaussian likelihood, with an exact denoiser that LoRA can tune."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import nn

from diffusers_ctrl.rollouts import Sampler


def cosine_scheduler(**kwargs) -> DDIMScheduler:
    return DDIMScheduler(
        **{
            "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
            "clip_sample": False,
            **kwargs,
        }
    )


class GaussianDenoiser(nn.Module):
    """The exact v-prediction for x ~ N(mean, std²), one coordinate at a time, plus a head that is zero until LoRA moves it.

    The head is slope(h) · x + shift(h), with h the time (and, once injected, label) embedding: the optimal control of a Gaussian
    likelihood has exactly this form.
    """

    def __init__(self, mean: float, std: float, scheduler: DDIMScheduler, width: int = 64, dimensions: int = 1) -> None:
        super().__init__()
        self.mean, self.std, self.alphas = mean, std, scheduler.alphas_cumprod.double()
        self.width = width
        self.time_embedding = TimestepEmbedding(width, width)
        self.slope = nn.Linear(width, dimensions)
        self.shift = nn.Linear(width, dimensions)
        for linear in (self.slope, self.shift):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor | int) -> torch.Tensor:
        t = int(timestep)
        alpha = self.alphas[t].item()
        a, b = math.sqrt(alpha), math.sqrt(1 - alpha)
        clean = self.mean + a * self.std**2 / (alpha * self.std**2 + 1 - alpha) * (sample - a * self.mean)
        velocity = (a * (sample - a * clean) / b) - b * clean
        features = get_timestep_embedding(torch.full((len(sample),), t), self.width).to(sample)
        hidden = torch.nn.functional.silu(self.time_embedding(features))
        return velocity + self.slope(hidden) * sample + self.shift(hidden)


@dataclass(frozen=True)
class GaussianLikelihood:
    """log N(y_label; x, noise²), up to no constant: labels (B, 1) index `observations`."""

    observations: tuple[float, ...]
    noise: float

    def __call__(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        y = torch.tensor(self.observations, dtype=x.dtype)[labels[:, 0].long()]
        return -0.5 * ((x[:, 0] - y) / self.noise) ** 2 - math.log(self.noise) - 0.5 * math.log(2 * math.pi)


def affine_steps(mean: float, std: float, sampler: Sampler) -> list[tuple[float, float, float]]:
    """(slope, shift, sigma) of each base step x -> slope · x + shift + sigma · noise, read off the transitions in float64."""
    denoiser = GaussianDenoiser(mean, std, sampler.scheduler).double()
    steps = []
    for t in sampler.timesteps:
        points = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        with torch.no_grad():
            step = sampler.transition(denoiser(points, t), t, points)
        low, high = step.mean.flatten().tolist()
        steps.append((high - low, low, step.std.item()))
    return steps


def base_moments(steps: list[tuple[float, float, float]]) -> tuple[float, float]:
    """Mean and variance of x_K under the base sampler (not of the ideal prior: K is finite)."""
    mean, variance = 0.0, 1.0
    for slope, shift, sigma in steps:
        mean, variance = slope * mean + shift, slope**2 * variance + sigma**2
    return mean, variance


def exact_log_partition(steps: list[tuple[float, float, float]], y: float, noise: float, gamma: float = 1.0) -> float:
    """log E_pre[N(y; x, noise²)^gamma] in nats."""
    mean, variance = base_moments(steps)
    # N(y; x, s²)^g = N(y; x, s²/g) · sqrt(2 pi s²/g) / (2 pi s²)^{g/2}
    s2 = noise**2 / gamma
    total = variance + s2
    log_normal = -0.5 * (y - mean) ** 2 / total - 0.5 * math.log(2 * math.pi * total)
    return log_normal + 0.5 * math.log(2 * math.pi * s2) - gamma * 0.5 * math.log(2 * math.pi * noise**2)


def posterior_moments(steps: list[tuple[float, float, float]], y: float, noise: float, gamma: float = 1.0) -> tuple[float, float]:
    """Mean and variance of p_pre(x) N(y; x, noise²)^gamma / Z."""
    mean, variance = base_moments(steps)
    precision = 1 / variance + gamma / noise**2
    return (mean / variance + gamma * y / noise**2) / precision, 1 / precision


def best_objective(steps: list[tuple[float, float, float]], y: float, noise: float, gamma: float = 1.0) -> float:
    """max J over all controls, in nats, by dynamic programming on quadratics V(x) = p x²/2 + q x + r.

    Smaller than log Z, because a Gaussian step with the base's variance cannot have the posterior's smaller one: the gap that no
    training removes. It vanishes as the number of steps grows.
    """
    p, q = -gamma / noise**2, gamma * y / noise**2
    r = -gamma * (0.5 * y**2 / noise**2 + 0.5 * math.log(2 * math.pi * noise**2))
    for slope, shift, sigma in reversed(steps):
        # max_u E V(m + sigma (u + eps)) − u²/2 with m = slope x + shift; a step without noise is the base's
        if sigma > 0:
            gain = 1 / (1 - p * sigma**2)
            r = r + 0.5 * p * sigma**2 + 0.5 * gain * (sigma * q) ** 2
            p, q = p * gain, q * gain
        r = r + 0.5 * p * shift**2 + q * shift
        q = slope * (q + p * shift)
        p = p * slope**2
    return r + 0.5 * p  # x_0 ~ N(0, 1)
