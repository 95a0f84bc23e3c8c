"""The methods of the tables of peers.py, each with the one number that is tuned: how it is fitted, and how it draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from baselines import best_of_n, cfg_finetune, classifier_guidance, ddpo, dps, draft, mpgd, tfg
from baselines.base import Base, Labelled
from exact_reference import Reference

from diffusers_ctrl import Classifier, LabelSpace, Policy
from diffusers_ctrl.adapters import Adapter
from diffusers_ctrl.rollouts import Environment, rollout
from task import TaskConfig


PLAIN = "plain"  # the aim that a weight of 1 serves
RECIPE = "recipe"  # the kind of adapter that a setting's own recipe trains
EXACT = "exact draws"
Draw = Callable[[torch.Tensor, torch.Tensor, torch.Generator], torch.Tensor]  # label (A,), prompt rows (n,), generator -> images


@dataclass(frozen=True)
class Trained:
    """An adapter of ours, on its base. seconds: of its training, its classifier's included."""

    adapter: Adapter
    policy: Policy
    environment: Environment
    seconds: float


@dataclass(frozen=True)
class Setting:
    """One seed of one table's row of labels.

    classifier: the one that all methods are given. opened: the adapter of that classifier by its kind: RECIPE, or a name under `variants` of
    experiments/peers.yaml. labels: (M, A).
    data: the labelled images, which the trained baselines learn from. reference: the exact law at gamma = 1. smoke: everything at toy size.
    """

    base: Base
    space: LabelSpace
    classifier: Classifier
    opened: Callable[[str], Trained]
    labels: torch.Tensor
    data: Labelled
    reference: Reference
    task: TaskConfig
    seed: int
    smoke: bool = False

    def likelihood(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Its log p̂(y | x), (n,) nats."""
        return self.classifier.log_prob(images, labels)

    def row_of(self, label: torch.Tensor) -> int:
        """Which of the labels this one (A,) is."""
        return int((self.labels == label).all(dim=1).nonzero()[0])

    def updates(self, count: int) -> int:
        return min(count, 2) if self.smoke else count


def sharpness(one: dict[str, Any]) -> float:
    """The classifier's accuracy of what was tried, without the rounding that would part equals."""
    return round(one["classifier_accuracy"], 9)


def is_best(one: dict[str, Any], others: Sequence[dict[str, Any]]) -> bool:
    """Whether it is better than all the others for an aim, the distance or the accuracy, and could be better still."""
    return one["tv"] < min(other["tv"] for other in others) or max(map(sharpness, others)) < sharpness(one) < 1


def beyond(weight: float, weights: Sequence[float]) -> float:
    """The weight that comes after it, where it is beyond the list or ends it: by the ratio of the last two."""
    return float(f"{weight * weights[-1] / weights[-2]:.2g}")


@dataclass(frozen=True)
class Method:
    """weights: what is tried; open_ended: and beyond, by the ratio of the last two, as long as the last is the best for an aim
    and could be better. fit: what is made once, before any weight is known, if anything. draw: (setting, what was made, weight) -> how to draw.

    priced: whether its steps go through `Base.price`, so that the KL of its paths to the base's is known. adapter: the kind
    that it needs, if any: only for settings that have it. plain: whether a weight of 1 is what Bayes says, for single draws, so that it needs no
    tuning.
    """

    weights: tuple[float, ...]
    draw: Callable[[Setting, Any, float], Draw]
    fit: Callable[[Setting], Any] | None = None
    priced: bool = False
    adapter: str | None = None
    plain: bool = False
    open_ended: bool = False

    def next_weight(self, tried: Sequence[dict[str, Any]]) -> float | None:
        """What is to be tried after these, if anything. tried: the weights, total variations and the classifier's accuracies."""
        if len(tried) < len(self.weights):
            return self.weights[len(tried)]
        if not self.open_ended:
            return None
        *others, last = tried
        return beyond(last["weight"], self.weights) if is_best(last, others) else None


def training_free(module: Any) -> Callable[[Setting, Any, float], Draw]:
    return lambda s, _, weight: lambda y, prompts, g: module.sample(s.base, s.likelihood, y, prompts, g, weight=weight)


def with_tds(s: Setting, _: None, weight: float) -> Draw:
    from baselines import tds  # needs azula, which not everybody who runs the others has

    return training_free(tds)(s, None, weight)


def exact(s: Setting, _: None, weight: float) -> Draw:
    def draw(y: torch.Tensor, prompts: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        rows = s.reference.draws(s.row_of(y), prompts, generator, gamma=weight)
        return s.reference.images[rows].float()

    return draw


def fit_noisy_classifier(s: Setting) -> Any:
    return classifier_guidance.fit(s.base, s.data, updates=s.updates(3000), seed=s.seed)


def with_noisy_classifier(s: Setting, fitted: Any, weight: float) -> Draw:
    return lambda y, prompts, g: classifier_guidance.sample(s.base, s.likelihood, y, prompts, g, classifier=fitted, weight=weight)


def fit_cfg(s: Setting) -> Policy:
    return cfg_finetune.fit(s.base, s.space, s.data, updates=s.updates(1000), seed=s.seed)


def with_cfg(s: Setting, policy: Policy, weight: float) -> Draw:
    return lambda y, prompts, g: cfg_finetune.sample(s.base, s.likelihood, y, prompts, g, policy=policy, weight=weight)


def by_rl(module: Any) -> Callable[[Setting, Any, float], Draw]:
    """weight: how many updates it gets, which is all that holds it near the base. Each is a training of its own."""

    def draw(s: Setting, _: None, weight: float) -> Draw:
        policy = module.fit(s.base, s.space, s.likelihood, s.labels, weight=s.updates(int(weight)), seed=s.seed)
        return lambda y, prompts, g: module.sample(s.base, s.likelihood, y, prompts, g, policy=policy)

    return draw


class Strengthened:
    """A policy with a pipeline's `strength`: base + strength · (tuned − base), at no call more where its control head is alone."""

    def __init__(self, policy: Policy, strength: float) -> None:
        self.policy, self.strength = policy, strength
        self.reference, self.merged, self.shares_base = policy.reference, policy.merged, policy.shares_base

    def both(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tuned, base = self.policy.both(*args)
        return torch.lerp(base, tuned, self.strength), base

    def __call__(self, *args: Any) -> torch.Tensor:
        return self.both(*args)[0]


def ours(particles: int) -> Callable[[Setting, Trained, float], Draw]:
    """weight: gamma, where the adapter was trained for a range of it, and beyond the range its end with strength weight/end, as a pipeline
    has both. particles: of exact sampling; 1 is one plain call."""

    def make(s: Setting, trained: Trained, weight: float) -> Draw:
        end = (trained.adapter.config.gamma_range or [weight, weight])[1]
        policy, environment = trained.policy, replace(trained.environment, gamma=min(weight, end), gamma_range=None)
        if weight > end:
            policy = Strengthened(policy, weight / end)

        @torch.no_grad()
        def draw(y: torch.Tensor, prompts: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
            every = prompts.repeat_interleave(particles)
            batch = environment.batch(torch.full_like(every, s.row_of(y)), every, generator)
            with policy.merged():
                found = rollout(policy, environment.sampler, batch, generator, reference=particles > 1 or s.base.kl is not None)
            if s.base.kl is not None:
                s.base.kl = found.kl
            images = environment.decode(found.sample)
            twice = (particles > 1 or weight > end) and not policy.shares_base
            s.base.calls["forward"] += len(every) * s.base.steps * (2 if twice else 1)
            if particles == 1:
                return images
            weights = weight * environment.score(images, batch.labels).double() - found.log_ratio
            chosen = torch.multinomial(weights.view(-1, particles).softmax(dim=1), 1, generator=generator).flatten()
            return images.view(-1, particles, *images.shape[1:])[torch.arange(len(prompts)), chosen]

        return draw

    return make


METHODS = {
    "base": Method((0,), lambda s, _, weight: lambda y, prompts, g: s.base.draw(prompts, g), priced=True),
    EXACT: Method((1, 2, 4, 8), exact, plain=True, open_ended=True),
    "CTRL": Method((1, 1.6, 2.5, 4), ours(1), lambda s: s.opened(RECIPE), priced=True, adapter=RECIPE, plain=True),
    "CTRL, 8 particles": Method((1, 2.5, 4), ours(8), lambda s: s.opened(RECIPE), adapter=RECIPE),
    "CTRL, trained longer": Method((1, 2, 4, 8), ours(1), lambda s: s.opened("longer"), priced=True, adapter="longer", plain=True),
    "CTRL, control head": Method(
        (1, 2, 4, 8, 12, 16), ours(1), lambda s: s.opened("head"), priced=True, adapter="head", plain=True, open_ended=True
    ),
    "CTRL, control head, gamma to 16": Method(
        (1, 2, 4, 8, 12, 16), ours(1), lambda s: s.opened("wider"), priced=True, adapter="wider", plain=True, open_ended=True
    ),
    "CTRL, control head, 8 particles": Method((1, 2, 4), ours(8), lambda s: s.opened("head"), adapter="head"),
    "CFG fine-tuning": Method((1, 2, 3, 5, 8, 12), with_cfg, fit_cfg, plain=True, open_ended=True),
    "DPS": Method((0.12, 0.25, 0.5, 1, 2, 4, 8, 16), training_free(dps), priced=True, plain=True, open_ended=True),
    "MPGD": Method((0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4), training_free(mpgd), open_ended=True),
    "best of n": Method((2, 4, 8, 16), training_free(best_of_n)),
    "classifier guidance": Method(
        (0.5, 1, 2, 4, 8, 16, 32), with_noisy_classifier, fit_noisy_classifier, priced=True, plain=True, open_ended=True
    ),
    "DRaFT-K, no KL": Method((30, 60), by_rl(draft), priced=True),
    "DDPO, no KL": Method((30, 60), by_rl(ddpo), priced=True),
    "TDS": Method((0.06, 0.12, 0.25, 0.5, 1), with_tds, open_ended=True),
    "TFG": Method((0.1, 0.3, 1, 3, 10), training_free(tfg), open_ended=True),
}
