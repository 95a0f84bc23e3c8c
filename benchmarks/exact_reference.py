"""The exact conditional law of the digits, from many base samples reweighted by p̂(y | x)^gamma, and how far samples are from it.

Two distances. Total variation of the law of (digit, decile of the attribute), or (digit, tercile, tercile) of two attributes, all as measured
on the pictures. Squared maximum mean discrepancy (unbiased) of the pictures at 8x8, Gaussian kernels of half, once and twice the median
distance. Both come with what as many exact draws score, their prompts in turn as the methods draw them: that is nearer than independent prompts
would be, and takes the mean of the unbiased MMD² below zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from baselines.base import Base, Likelihood
from tqdm.auto import tqdm

from diffusers_ctrl import Classifier
from digits_data import MEASURES as DIGIT_MEASURES
from digits_data import digit_oracle
from jpeg_data import jpeg_kilobytes


MEASURES = {**DIGIT_MEASURES, "jpeg": jpeg_kilobytes}
DIGITS, DECILES, TERCILES = 10, 10, 3
FLOOR_REPEATS, EXACT_DRAWS = 50, 2000
VALIDATION, JUDGED, JUDGE, PRICED, FLOORS = range(1, 6)


def noise_seed(seed: int, use: int) -> int:
    """What to seed a generator with for one use of noise in the run of one seed: no two seeds, and no two uses, have the same."""
    return 10 * seed + use


def histogram(cells: torch.Tensor, weights: torch.Tensor, size: int = DIGITS * DECILES) -> torch.Tensor:
    """(size,) probabilities."""
    out = torch.zeros(size, dtype=torch.float64).index_add(0, cells, weights)
    return out / out.sum()


def distance(p: torch.Tensor, q: torch.Tensor) -> float:
    """Total variation."""
    return ((p - q).abs().sum() / 2).item()


def small(images: torch.Tensor) -> torch.Tensor:
    """(n, 64) grey levels."""
    return F.adaptive_avg_pool2d(images.mean(dim=1, keepdim=True), 8).flatten(1)


@dataclass(frozen=True)
class Reference:
    """The base's pool. cells: (N,) of pictures; features: (N, 64); log_weights: (N, M) normalised within each prompt.

    images: (N, C, H, W), of half precision. num_prompts: row i of the pool is of prompt i modulo this. edges: of each attribute's bins.
    log_partition: log E_base[p̂^gamma], mean over prompts and labels, nats.
    """

    images: torch.Tensor
    num_prompts: int
    cells: torch.Tensor
    features: torch.Tensor
    log_weights: torch.Tensor
    edges: tuple[torch.Tensor, ...]
    attributes: tuple[str, ...]
    log_partition: float

    @property
    def size(self) -> int:
        """How many cells there are."""
        return DIGITS * math.prod(len(edges) + 1 for edges in self.edges)

    def cells_of(self, images: torch.Tensor) -> torch.Tensor:
        return to_cells(digit_oracle(images), [MEASURES[name](images) for name in self.attributes], self.edges)

    def digits_of(self, cells: torch.Tensor) -> torch.Tensor:
        return cells // (self.size // DIGITS)

    def law(self, label: int) -> torch.Tensor:
        """(size,) probabilities."""
        return histogram(self.cells, self.log_weights[:, label].exp(), self.size)

    def effective_sizes(self, label: int, gamma: float = 1.0) -> torch.Tensor:
        """(num_prompts,) effective sample sizes of the weights that `draws` draws by: of how few pictures these are."""
        rows = [torch.arange(prompt, len(self.cells), self.num_prompts) for prompt in range(self.num_prompts)]
        return torch.stack([1 / (gamma * self.log_weights[own, label]).softmax(dim=0).square().sum() for own in rows])

    def draws(self, label: int, prompts: torch.Tensor, generator: torch.Generator, gamma: float = 1.0) -> torch.Tensor:
        """Rows of the pool, drawn from the exact law of each of `prompts` (n,). gamma: a power of the weights."""
        out = torch.empty(len(prompts), dtype=torch.long)
        for prompt in prompts.unique().tolist():
            own, places = torch.arange(prompt, len(self.cells), self.num_prompts), (prompts == prompt).nonzero().flatten()
            weights = (gamma * self.log_weights[own, label]).softmax(dim=0)
            out[places] = own[weights.multinomial(len(places), replacement=True, generator=generator)]
        return out

    def in_turn(self, label: int, count: int, generator: torch.Generator) -> torch.Tensor:
        """The same for prompts in turn, as every method of peers.py draws them."""
        return self.draws(label, torch.arange(count) % self.num_prompts, generator)


def to_cells(digits: torch.Tensor, measured: Sequence[torch.Tensor], edges: Sequence[torch.Tensor]) -> torch.Tensor:
    cells = digits
    for values, borders in zip(measured, edges, strict=True):
        cells = cells * (len(borders) + 1) + torch.bucketize(values, borders)
    return cells


def of_each(images: torch.Tensor, labels: torch.Tensor, likelihood: Likelihood | Classifier) -> torch.Tensor:
    """log p̂ of every label (M, A) at every image, (n, M) nats; a classifier looks at an image once."""
    if isinstance(likelihood, Classifier):
        parts = [found[:, column.long()] for found, column in zip(likelihood.log_probs(images), labels.T, strict=True)]
        return torch.stack(parts).sum(dim=0)
    return torch.stack([likelihood(images, row.expand(len(images), -1)) for row in labels], dim=1)


def make_reference(
    base: Base,
    likelihood: Likelihood | Classifier,
    labels: torch.Tensor,
    gamma: float,
    attributes: Sequence[str],
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
    digits, features, scores = [], [], []
    measured: list[list[torch.Tensor]] = [[] for _ in attributes]
    for part in images.split(2000):
        part = part.float()
        digits.append(digit_oracle(part))
        for column, name in zip(measured, attributes, strict=True):
            column.append(MEASURES[name](part))
        features.append(small(part))
        with torch.no_grad():
            scores.append(of_each(part, labels, likelihood).double())
    columns, weighted = [torch.cat(column) for column in measured], gamma * torch.cat(scores)
    bins = DECILES if len(attributes) == 1 else TERCILES
    edges = tuple(column.quantile(torch.arange(1, bins, dtype=torch.float64) / bins) for column in columns)
    log_weights, log_z = torch.empty_like(weighted), []
    for prompt in prompts.unique():
        own = prompts == prompt
        log_weights[own] = weighted[own].log_softmax(dim=0) - math.log(len(base.conditions))
        log_z.append(weighted[own].logsumexp(dim=0) - math.log(int(own.sum())))
    cells = to_cells(torch.cat(digits), columns, edges)
    law = (log_weights, edges, tuple(attributes), torch.stack(log_z).mean().item())
    return Reference(images, len(base.conditions), cells, torch.cat(features), *law)


def total_variation(cells: torch.Tensor, law: torch.Tensor) -> float:
    """Of the cells' frequencies to a law."""
    return distance(histogram(cells, torch.ones(len(cells), dtype=torch.float64), len(law)), law)


def distance_to_law(reference: Reference, images: Sequence[torch.Tensor]) -> float:
    """Total variation of each label's images to its exact law, mean over the labels."""
    return sum(total_variation(reference.cells_of(own), reference.law(label)) for label, own in enumerate(images)) / len(images)


def mmd2_to(b: torch.Tensor) -> Callable[[torch.Tensor], float]:
    """(n, d) -> unbiased squared MMD to b (m, d), whose own part is computed once; the kernels' width is that of b's median distance."""
    width = torch.pdist(b[:500]).median()

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        squares = torch.cdist(x, y).square()
        return sum((-squares / (2 * (scale * width) ** 2)).exp() for scale in (0.5, 1.0, 2.0)) / 3

    def within(x: torch.Tensor) -> torch.Tensor:
        gram = kernel(x, x)
        return (gram.sum() - gram.diag().sum()) / (len(x) * (len(x) - 1))

    own = within(b)
    return lambda a: (within(a) + own - 2 * kernel(a, b).mean()).item()


def to_exact(reference: Reference, label: int, generator: torch.Generator) -> Callable[[torch.Tensor], float]:
    """(n, 64) features -> squared MMD to many exact draws of this label."""
    return mmd2_to(reference.features[reference.in_turn(label, EXACT_DRAWS, generator)])


def of_exact_draws(reference: Reference, count: int, generator: torch.Generator) -> dict[str, float]:
    """tv and mmd2 of sets of exact draws, `count` a label: means over labels and sets, `_floor`, and the standard deviation from set to set."""
    sets: dict[str, list[torch.Tensor]] = {"tv": [], "mmd2": []}
    for label in range(reference.log_weights.shape[1]):
        law, far = reference.law(label), to_exact(reference, label, generator)
        draws = [reference.in_turn(label, count, generator) for _ in range(FLOOR_REPEATS)]
        sets["tv"].append(torch.tensor([total_variation(reference.cells[rows], law) for rows in draws]))
        sets["mmd2"].append(torch.tensor([far(reference.features[rows]) for rows in draws]))
    means = {name: torch.stack(values).mean(dim=0) for name, values in sets.items()}
    floors = {f"{name}_floor": values.mean().item() for name, values in means.items()}
    return floors | {f"{name}_floor_sd": values.std().item() for name, values in means.items()}
