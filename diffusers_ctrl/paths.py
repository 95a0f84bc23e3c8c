"""Trajectories that are gone through once more, backwards, in memory that does not grow with their number of steps.

A gradient through a sampler, or along its trajectory, needs the states from the last to the first. Two things would grow with K: the
activations of the denoiser's calls, and the states. The first do not where the gradient of each step is taken as soon as the step's
own loss is there (`StepLosses`). Of the states, up to KEPT_STATES are kept; of a longer trajectory every n-th, and the n − 1 in between
are computed again on the way back, with the random numbers that they had (one more call of the tuned model each, no gradient). Where it is
known beforehand which are needed, and they are few, those are kept and nothing is computed again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from .policy import Policy
from .randomness import RandomSource
from .rollouts import Batch, Sampler, rollout


KEPT_STATES = 64


@dataclass(frozen=True)
class Path:
    """A trajectory of the tuned model, taken without a graph.

    spans: the steps in order, in runs. states: x_k at the first step of each run, (B, C, *); random: a copy of the generator as it was
    there. sample: x_K, (B, C, *).
    """

    spans: tuple[range, ...]
    states: tuple[torch.Tensor, ...]
    random: tuple[RandomSource, ...]
    sample: torch.Tensor


def walk(
    policy: Policy,
    sampler: Sampler,
    batch: Batch,
    generator: RandomSource,
    kept: int = KEPT_STATES,
    needed: Collection[int] | None = None,
) -> Path:
    """Samples a trajectory as `rollout` does, keeping at most `kept` of its states: those `needed`, if so few are, else every n-th."""
    steps = len(sampler.timesteps)
    stride = -(-steps // kept)
    firsts = list(range(0, steps, stride)) if needed is None or len(needed) >= kept else sorted({0, *needed})
    spans = tuple(range(first, end) for first, end in pairwise([*firsts, steps]))
    x, states, random = batch.noise, [], []
    if generator is None and len(spans) < steps:  # what is drawn again must come from a generator that can be set back
        generator = torch.Generator(x.device).manual_seed(int(torch.randint(2**62, ())))
    for span in spans:
        states.append(x)
        random.append(_copied(generator) if len(span) > 1 else None)
        x = rollout(policy, sampler, replace(batch, noise=x), generator, reference=False, span=span).sample
    return Path(spans, tuple(states), tuple(random), x)


def backwards(policy: Policy, sampler: Sampler, batch: Batch, path: Path) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(k, x_k, x_{k+1}) from the last step to the first."""
    following = path.sample
    for span, start, random in zip(path.spans[::-1], path.states[::-1], path.random[::-1], strict=True):
        states = (start,)
        if len(span) > 1:
            again = replace(batch, noise=start)
            states = rollout(policy, sampler, again, _copied(random), reference=False, span=span[:-1]).states
        for k, x in zip(reversed(span), reversed(states), strict=True):
            yield k, x, following
            following = x


def states_at(
    policy: Policy, sampler: Sampler, batch: Batch, path: Path, wanted: Collection[int]
) -> Iterator[tuple[int, torch.Tensor]]:
    """(k, x_k) for the steps k `wanted`, from the last to the first; nothing is computed again where the path has them all."""
    firsts = [span[0] for span in path.spans]
    if set(wanted) <= set(firsts):
        yield from ((k, x) for k, x in zip(reversed(firsts), reversed(path.states), strict=True) if k in wanted)
    else:
        yield from ((k, x) for k, x, _ in backwards(policy, sampler, batch, path) if k in wanted)


def parts(size: int, at_a_time: int | None) -> list[slice]:
    """The rows of a batch of `size`, at most so many at a time; all at once for None."""
    length = size if at_a_time is None else at_a_time
    return [slice(first, min(first + length, size)) for first in range(0, size, length)]


def _copied(source: RandomSource) -> RandomSource:
    return source.clone_state() if isinstance(source, torch.Generator) else source.copy()


# -- gradients --


def gradients(
    outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], grad_outputs: Sequence[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    """Of the outputs in the inputs, None for an input that no output depends on. Autocast, meant for forwards, is off meanwhile."""
    with torch.autocast(outputs[0].device.type, enabled=False):
        return list(torch.autograd.grad(outputs, inputs, grad_outputs, allow_unused=True))


def scales_losses(x: torch.Tensor) -> bool:
    """Whether the gradient must be taken of the whole loss: under float16 it is scaled up first, by a factor known only later."""
    return torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type) == torch.float16


class StepLosses:
    """A sum of losses, one a step, each of which takes its gradient when it is added, so that no step's graph outlives it.

    `total()` is a loss like any other: its `backward` brings the gradients that were taken to the parameters. Under float16 autocast it
    has the graphs of all steps (see `scales_losses`).
    """

    def __init__(self, policy: Policy, like: torch.Tensor) -> None:
        self.value = like.new_zeros((), dtype=torch.promote_types(like.dtype, torch.float32))
        self.policy, self.whole = policy, scales_losses(like)
        self.roots = [] if self.whole else policy.roots()
        self.gradients: list[torch.Tensor | None] = [None] * len(self.roots)

    def step(self) -> AbstractContextManager[None]:
        """Where a step's loss is computed: no whole call need be recomputed for a gradient that is taken at once."""
        return nullcontext() if self.whole else self.policy.uncheckpointed()

    def add(self, loss: torch.Tensor) -> None:
        """loss: () with a graph that ends in the policy's parameters."""
        if self.whole:
            self.value = self.value + loss
        else:
            self.take(loss.detach(), gradients([loss], self.roots, [None]))

    def take(self, value: torch.Tensor, found: Sequence[torch.Tensor | None]) -> None:
        """A loss whose gradients in `roots` are known."""
        self.value = self.value + value
        for i, gradient in enumerate(found):
            if gradient is not None:
                self.gradients[i] = gradient if self.gradients[i] is None else self.gradients[i] + gradient

    def total(self) -> torch.Tensor:
        """The sum, ().

        Raises:
            RuntimeError: if no step had a gradient: something between the parameters and the denoiser's calls hides them.
        """
        if self.whole:
            return self.value
        if all(gradient is None for gradient in self.gradients):
            raise RuntimeError(
                "No gradient reached the LoRA or the label encoder: what wraps the policy must leave it its parameters."
            )
        return _Known.apply(self.value, self.gradients, *self.roots)


class _Known(torch.autograd.Function):
    """A value whose gradients in the roots were found before."""

    @staticmethod
    def forward(ctx, value, found, *roots):
        ctx.found = found
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return None, None, *(None if gradient is None else grad.to(gradient) * gradient for gradient in ctx.found)
