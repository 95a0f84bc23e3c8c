"""Classifier guidance (Dhariwal and Nichol, NeurIPS 2021, arXiv 2105.05233): a classifier of noisy latents, fitted to the same labelled
images, whose gradient shifts each step's mean by weight · std². No gradient through the denoiser."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .base import Base, Labelled, Likelihood, drawn


class NoisyClassifier(nn.Module):
    """log p(y | x_t) of categorical attributes, independent given x_t, from a latent and its log noise-to-signal ratio, (B,).

    Returns one (B, classes) an attribute.
    """

    def __init__(self, shape: tuple[int, ...], classes: tuple[int, ...], width: int = 128) -> None:
        super().__init__()
        self.classes = classes
        self.level = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, 2 * width))
        self.into = nn.Linear(math.prod(shape), width) if shape[-1] <= 4 else nn.Conv2d(shape[0], width, 3, padding=1)
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, sum(classes))

    def forward(self, x: torch.Tensor, log_ratio: torch.Tensor) -> list[torch.Tensor]:
        waves = log_ratio[:, None] * torch.linspace(0.1, 2.0, 8)
        scale, shift = self.level(torch.cat([waves.sin(), waves.cos()], dim=1)).chunk(2, dim=1)
        h = self.into(x.flatten(1)) if isinstance(self.into, nn.Linear) else F.silu(self.into(x)).mean(dim=(2, 3))
        h = F.silu(h * (1 + scale) + shift)
        out = self.out(F.dropout(h + F.silu(self.hidden(h)), 0.1, self.training))
        return [part.log_softmax(dim=1) for part in out.split(self.classes, dim=1)]


def log_prob(found: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Of labels (B, A), those that are not known left out: (B,) nats."""
    known = ~labels.isnan()
    columns = labels.nan_to_num().long().unsqueeze(2)
    parts = [part.gather(1, columns[:, i]).flatten() * known[:, i] for i, part in enumerate(found)]
    return torch.stack(parts).sum(dim=0)


def fit(base: Base, data: Labelled, *, updates: int = 3000, batch_size: int = 128, seed: int = 0) -> NoisyClassifier:
    generator = torch.Generator().manual_seed(seed)
    classes = tuple(int(column[~column.isnan()].max()) + 1 for column in data.labels.T)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NoisyClassifier(tuple(data.latents.shape[1:]), classes)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
        for _ in range(updates):
            rows = torch.randint(len(data.latents), (batch_size,), generator=generator)
            alpha2 = base.sampler.scheduler.alphas_cumprod[torch.randint(1000, (batch_size,), generator=generator)]
            alpha, sigma = (value.view(-1, *[1] * (data.latents.ndim - 1)) for value in (alpha2.sqrt(), (1 - alpha2).sqrt()))
            noise = torch.randn(data.latents[rows].shape, generator=generator)
            x = alpha * data.latents[rows] + sigma * noise
            loss = -log_prob(model(x, (sigma / alpha).flatten().log()), data.labels[rows]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval().requires_grad_(False)


def sample(
    base: Base,
    likelihood: Likelihood,
    label: torch.Tensor,
    prompts: torch.Tensor,
    generator: torch.Generator,
    *,
    classifier: NoisyClassifier,
    weight: float = 1.0,
) -> torch.Tensor:
    x = base.start(len(prompts), generator)
    for k in range(base.steps):
        alpha, sigma = base.levels(k)
        ratio = torch.full((len(x),), math.log(sigma / alpha))
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(log_prob(classifier(at, ratio), label.expand(len(x), -1)).sum(), at)
        with torch.no_grad():
            step = base.step(x, base.clean(x, k, prompts), k)
            shift = weight * torch.as_tensor(step.std) ** 2 * slope
            base.price(step.mean + shift, x, k, prompts)
            x = drawn(step, generator) + shift
    with torch.no_grad():
        return base.decode(x)
