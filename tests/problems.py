"""Problems for tests: a Gaussian prior and likelihood, with an exact denoiser that LoRA can tune; and a tiny U-Net in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import nn

from diffusers_ctrl import Categorical, LabelSpace, Policy
from diffusers_ctrl.rollouts import Environment, Sampler


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


def perturbed(policy: Policy, size: float) -> None:
    """Moves LoRA and label encoder off zero."""
    generator = torch.Generator().manual_seed(1)
    for group in policy.trainable_parameters().values():
        for parameter in group:
            parameter.data += size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def tiny_policy(
    guidance_scale: float = 1.0,
    perturb: float = 0.0,
    checkpointing: bool = False,
    gamma_range: tuple[float, float] | None = None,
    control_head: int = 0,
    lora_rank: int = 2,
) -> Policy:
    """A U-Net of a few thousand weights in float64, of three labels; `perturb` moves all that is trained."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    policy = Policy(
        unet,
        label_space=LabelSpace(kind=Categorical(("a", "b", "c"))),
        lora_rank=lora_rank,
        lora_targets=["to_q", "to_v", "conv1", "time_emb_proj"],
        guidance_scale=guidance_scale,
        checkpointing=checkpointing,
        gamma_range=gamma_range,
        control_head=control_head,
        shape=(2, 4, 4),
    ).double()
    perturbed(policy, perturb)
    return policy


def tiny_environment(steps: int = 5, options: dict | None = None, gamma: float = 1.3) -> Environment:
    """Two prompts and a smooth, non-linear log p̂ of three labels, for `tiny_policy`."""
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(3, 32, generator=generator, dtype=torch.float64)

    def reward(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        scores = (torch.tanh(x.flatten(1)) @ weights.T).log_softmax(dim=1)
        return scores.gather(1, labels.long()).squeeze(1)

    return Environment(
        Sampler(cosine_scheduler(), steps, options or {"eta": 1.0}),
        (2, 4, 4),
        reward,
        torch.tensor([[0.0], [1.0], [2.0]]),
        gamma,
        prompt_embeds=torch.randn(2, 3, 8, generator=generator, dtype=torch.float64),
        null_embeds=torch.randn(1, 3, 8, generator=generator, dtype=torch.float64),
    )
