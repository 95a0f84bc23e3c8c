"""The exact conditional law of the digits, from many base samples reweighted by p̂(y | x)^gamma, and how far samples are from it.

Two distances. Total variation of the law of (digit, decile of the attribute), digits and deciles as measured on the pictures. Squared maximum
mean discrepancy (unbiased) of the pictures at 8x8, Gaussian kernels of half, once and twice the median distance. Both come with their floor: what as
many exact draws would score.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from baselines.base import Base, Likelihood
from tqdm.auto import tqdm

from digits_data import MEASURES, digit_oracle


DIGITS, DECILES = 10, 10
FLOOR_REPEATS, EXACT_DRAWS = 20, 2000


def histogram(cells: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(DIGITS · DECILES,) probabilities."""
    out = torch.zeros(DIGITS * DECILES, dtype=torch.float64).index_add(0, cells, weights)
    return out / out.sum()


def distance(p: torch.Tensor, q: torch.Tensor) -> float:
    """Total variation."""
    return ((p - q).abs().sum() / 2).item()


def small(images: torch.Tensor) -> torch.Tensor:
    """(n, 64) grey levels."""
    return F.adaptive_avg_pool2d(images.mean(dim=1, keepdim=True), 8).flatten(1)


@dataclass(frozen=True)
class Reference:
    """The base's pool. cells: (N,) of pictures; features: (N, 64); log_weights: (N, M) normalised within each prompt; edges: of the deciles."""

    cells: torch.Tensor
    features: torch.Tensor
    log_weights: torch.Tensor
    edges: torch.Tensor
    attribute: str

    def cells_of(self, images: torch.Tensor) -> torch.Tensor:
        return digit_oracle(images) * DECILES + torch.bucketize(MEASURES[self.attribute](images), self.edges)

    def law(self, label: int) -> torch.Tensor:
        """(DIGITS · DECILES,) probabilities."""
        return histogram(self.cells, self.log_weights[:, label].exp())

    def draws(self, label: int, count: int, generator: torch.Generator) -> torch.Tensor:
        """Rows of the pool, drawn from the exact law."""
        return torch.multinomial(self.log_weights[:, label].exp(), count, replacement=True, generator=generator)


def make_reference(
    base: Base,
    likelihood: Likelihood,
    labels: torch.Tensor,
    gamma: float,
    attribute: str,
    count: int,
    cache: Path,
    batch_size: int = 500,
) -> Reference:
    """Draws `count` base samples, prompts in equal shares, or takes those in `cache`: pictures of half precision, nothing else."""
    prompts = torch.arange(count) % len(base.conditions)
    if cache.exists():
        images = torch.load(cache, weights_only=True)
        if len(images) != count:
            raise SystemExit(f"{cache} holds {len(images)} samples, not {count}: delete it, or give --base_samples {len(images)}.")
    else:
        generator, parts = torch.Generator().manual_seed(11), []
        for part in tqdm(prompts.split(batch_size), desc="base samples", unit="batch"):
            parts.append(base.draw(part, generator).half())
        images = torch.cat(parts)
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save(images, cache.with_suffix(".tmp"))
        cache.with_suffix(".tmp").rename(cache)
    cells, features, measured, scores = [], [], [], []
    for part in images.split(2000):
        part = part.float()
        cells.append(digit_oracle(part))
        measured.append(MEASURES[attribute](part))
        features.append(small(part))
        with torch.no_grad():
            scores.append(torch.stack([likelihood(part, row.expand(len(part), -1)) for row in labels], dim=1).double())
    measured, scores = torch.cat(measured), gamma * torch.cat(scores)
    edges = measured.quantile(torch.arange(1, DECILES, dtype=torch.float64) / DECILES)
    log_weights = torch.empty_like(scores)
    for prompt in prompts.unique():
        own = prompts == prompt
        log_weights[own] = scores[own].log_softmax(dim=0) - math.log(len(base.conditions))
    return Reference(
        torch.cat(cells) * DECILES + torch.bucketize(measured, edges), torch.cat(features), log_weights, edges, attribute
    )


def total_variation(cells: torch.Tensor, law: torch.Tensor) -> float:
    """Of the cells' frequencies to a law."""
    return distance(histogram(cells, torch.ones(len(cells), dtype=torch.float64)), law)


def mmd2(a: torch.Tensor, b: torch.Tensor) -> float:
    """Unbiased squared MMD of (n, d) and (m, d); the kernels' width is that of b's median distance."""
    width = torch.pdist(b[:500]).median()

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        squares = torch.cdist(x, y).square()
        return sum((-squares / (2 * (scale * width) ** 2)).exp() for scale in (0.5, 1.0, 2.0)) / 3

    def within(x: torch.Tensor) -> torch.Tensor:
        gram = kernel(x, x)
        return (gram.sum() - gram.diag().sum()) / (len(x) * (len(x) - 1))

    return (within(a) + within(b) - 2 * kernel(a, b).mean()).item()


def distances(reference: Reference, label: int, images: torch.Tensor, generator: torch.Generator) -> dict[str, float]:
    """tv, mmd2 and their floors for `images` that were drawn for this label."""
    law = reference.law(label)
    exact = reference.features[reference.draws(label, EXACT_DRAWS, generator)]
    floors = [reference.draws(label, len(images), generator) for _ in range(FLOOR_REPEATS)]
    return {
        "tv": total_variation(reference.cells_of(images), law),
        "tv_floor": sum(total_variation(reference.cells[rows], law) for rows in floors) / len(floors),
        "mmd2": mmd2(small(images), exact),
        "mmd2_floor": sum(abs(mmd2(reference.features[rows], exact)) for rows in floors[:5]) / 5,
    }
