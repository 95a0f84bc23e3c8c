"""Trajectories: the one denoising loop of training and evaluation.

Index k counts generation order: `states[0]` is noise, `states[K]` the clean sample, step k goes from `states[k]` to `states[k+1]`
at `timesteps[k]`.

A step without noise (the last one of DDIM, usually) has no density, so no KL can price what the tuned model would change there.
It is therefore always taken with the *base*, in training, in evaluation and in the pipeline: both laws then share that step, the
law of the result stays absolutely continuous, and J ≤ log Z holds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from .conditions import Condition
from .labels import LabelSpace
from .policy import Policy
from .randomness import RandomSource, standard_normal
from .transitions import Transition, model_input, transition


@dataclass(frozen=True)
class Sampler:
    """A scheduler with the settings that fix the base law: number of steps and the arguments of its transition.

    Args:
        scheduler: a diffusers scheduler with a Gaussian transition.
        num_inference_steps: K.
        options: keyword arguments of the transition, such as `eta` for DDIM.
        grid: keyword arguments of `set_timesteps` besides K: `timesteps` or `sigmas` (K of them, where the scheduler takes them), and
            `mu` for a flow scheduler with dynamic shifting, as the pipeline computes it from the image's size.

    Raises:
        ValueError: if the scheduler has no Gaussian transition, if every step is deterministic (eta = 0), or if `grid` does not fit.
    """

    scheduler: Any
    num_inference_steps: int
    options: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {self.num_inference_steps}.")
        self._set_timesteps()
        probe = torch.zeros(1, 3, 1, 1, dtype=torch.float64)
        noisy = [not self.transition(self._probe_output(1.0), t, probe).is_deterministic for t in self.timesteps]
        object.__setattr__(self, "noisy_steps", tuple(k for k, flag in enumerate(noisy) if flag))
        if not self.noisy_steps:
            raise ValueError(
                f"{type(self.scheduler).__name__} with {self.options} adds no noise at any step, so there is no KL to the base and "
                "nothing to train against: use eta > 0 (eta = 1 is the memoryless, unbiased choice)."
            )

    def _probe_output(self, value: float) -> torch.Tensor:
        """What a denoiser could answer to one state of three channels, every number `value`."""
        # a scheduler whose variance is learned can only be probed with the denoiser's own output
        learned = self.scheduler.config.get("variance_type") in ("learned", "learned_range")
        return torch.full((1, 6 if learned else 3, 1, 1), value, dtype=torch.float64)

    def _set_timesteps(self) -> None:
        name, steps = type(self.scheduler).__name__, self.num_inference_steps
        takes = inspect.signature(self.scheduler.set_timesteps).parameters
        if unknown := [key for key in self.grid if key not in takes]:
            raise ValueError(f"{name}.set_timesteps does not take {', '.join(unknown)}: its grid is fixed by the number of steps.")
        if "mu" in takes and self.scheduler.config.get("use_dynamic_shifting") and self.grid.get("mu") is None:
            raise ValueError(
                f"{name} has use_dynamic_shifting=True: give grid={{'mu': …}}, as the pipeline computes it from the size."
            )
        given = [key for key in ("timesteps", "sigmas") if self.grid.get(key) is not None]
        for key in given:
            if len(self.grid[key]) != steps:
                raise ValueError(f"grid has {len(self.grid[key])} {key} for num_inference_steps = {steps}: as many are needed.")
        if given:
            self.scheduler.set_timesteps(**self.grid)
        else:
            self.scheduler.set_timesteps(steps, **self.grid)

    @property
    def timesteps(self) -> torch.Tensor:
        """(K,) t_k in generation order."""
        return self.scheduler.timesteps

    @property
    def deterministic_timesteps(self) -> frozenset[float]:
        """The timesteps whose step adds no noise; the base takes them."""
        return frozenset(float(t) for k, t in enumerate(self.timesteps) if k not in self.noisy_steps)

    @cached_property
    def held_weights(self) -> tuple[tuple[float, float], ...]:
        """(A, B) of each step, whose mean is A · state + B · clean estimate; read off its transition where nothing is clipped.

        Raises ValueError where a transition does not say its clean estimate, `denoised`.
        """
        weights, small = [], 1e-3
        for t in self.timesteps:
            x, output = torch.zeros(1, 3, 1, 1, dtype=torch.float64), self._probe_output(small)
            of_output = self.transition(output, t, x)
            of_state = self.transition(torch.zeros_like(output), t, x + small)
            if of_output.denoised is None:
                raise ValueError(
                    f"The transition of {type(self.scheduler).__name__} has no `denoised`, the clean sample that it was made from, which a coarse "
                    "adjoint needs: give it one, or set coarse_adjoint: false."
                )
            clean = (of_output.mean / of_output.denoised).flatten()[0].item()
            state = ((of_state.mean - clean * of_state.denoised) / small).flatten()[0].item()
            weights.append((state, clean))
        return tuple(weights)

    def held(self, base: Transition, k: int, end: int) -> torch.Tensor:
        """The mean of x_end, (B, *), were the clean sample of the transition of step k < end held over the later steps too."""
        if end == k + 1:
            return base.mean
        of_state, of_clean = 1.0, 0.0
        for state, clean in self.held_weights[k + 1 : end]:
            of_state, of_clean = state * of_state, state * of_clean + clean
        return of_state * base.mean + of_clean * base.denoised

    def transition(self, output: torch.Tensor, t: torch.Tensor | float, x: torch.Tensor) -> Transition:
        return transition(self.scheduler, output, t, x, **self.options)

    def model_input(self, t: torch.Tensor | float, x: torch.Tensor) -> torch.Tensor:
        """What the denoiser is given for the state x at t: the state itself, or scaled for a scheduler of sigmas."""
        return model_input(self.scheduler, t, x)


@dataclass(frozen=True)
class Batch:
    """What a trajectory starts from. Everything a rollout needs besides the random numbers of its steps.

    noise: x_0, (B, C, *). labels: (B, A), NaN where not given. gamma: (B,). prompt_embeds, null_embeds: (B, L, D) or None; or the
    first all that the pipeline gives its denoiser for each row, as a `Condition`.
    prompts, label_rows: index of each row's prompt and label among the environment's, (B,).
    """

    noise: torch.Tensor
    labels: torch.Tensor
    gamma: torch.Tensor
    prompt_embeds: torch.Tensor | Condition | None = None
    null_embeds: torch.Tensor | None = None
    prompts: torch.Tensor | None = None
    label_rows: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.noise)

    def __getitem__(self, rows: Any) -> Batch:
        return Batch(*(None if value is None else value[rows] for value in vars(self).values()))


@dataclass(frozen=True)
class Rollout:
    """A batch of trajectories and what they cost.

    states: (K+1, B, C, *), a tuple of K+1 tensors. kl: Σ_k KL_k, (B,) nats. log_ratio: Σ_k log p_theta/p_pre of the taken steps,
    (B,) nats. stds: std of each step's transition.
    """

    states: tuple[torch.Tensor, ...]
    kl: torch.Tensor
    log_ratio: torch.Tensor
    stds: tuple[torch.Tensor, ...]

    @property
    def sample(self) -> torch.Tensor:
        """x_K, (B, C, *)."""
        return self.states[-1]


def tuned_transition(policy: Policy, sampler: Sampler, batch: Batch, k: int, x: torch.Tensor) -> Transition:
    """p_theta(x_{k+1} | x_k = x). Only for a step that has noise."""
    t = sampler.timesteps[k]
    return sampler.transition(
        policy(sampler.model_input(t, x), t, batch.labels, batch.gamma, batch.prompt_embeds, batch.null_embeds), t, x
    )


def base_transition(policy: Policy, sampler: Sampler, batch: Batch, k: int, x: torch.Tensor) -> Transition:
    """p_pre(x_{k+1} | x_k = x)."""
    t = sampler.timesteps[k]
    return sampler.transition(policy.reference(sampler.model_input(t, x), t, batch.prompt_embeds, batch.null_embeds), t, x)


def both_transitions(policy: Policy, sampler: Sampler, batch: Batch, k: int, x: torch.Tensor) -> tuple[Transition, Transition]:
    """The tuned model's and the base's, by one call of the denoiser where a control head is alone. Only for a step that has noise."""
    t = sampler.timesteps[k]
    outputs = policy.both(sampler.model_input(t, x), t, batch.labels, batch.gamma, batch.prompt_embeds, batch.null_embeds)
    tuned, base = (sampler.transition(output, t, x) for output in outputs)
    return tuned, base


def rollout(
    policy: Policy,
    sampler: Sampler,
    batch: Batch,
    generator: RandomSource = None,
    *,
    tuned: bool = True,
    grad_steps: int = 0,
    reference: bool = True,
    span: range | None = None,
    priced: Collection[int] | None = None,
) -> Rollout:
    """Samples trajectories from the tuned model (or, with `tuned=False`, from the base).

    Args:
        grad_steps: how many of the last steps build a graph; the state entering the first of them is detached.
        reference: whether to call the base on steps without a graph, for their KL and log-ratio. Without it, these steps count 0.
        span: take these steps only, the first of them from `batch.noise`; all by default.
        priced: call the base for the KL and log-ratio of these noisy steps only; all by default.

    Returns:
        A `Rollout`; `kl` carries a graph over the last `grad_steps` steps.
    """
    steps = len(sampler.timesteps)
    x = batch.noise
    states, stds = [x], []
    kl = torch.zeros(len(batch), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    log_ratio = torch.zeros(len(batch), dtype=torch.float64, device=x.device)
    for k in range(steps) if span is None else span:
        with_grad = k >= steps - grad_steps
        with torch.set_grad_enabled(with_grad):
            if k not in sampler.noisy_steps or not tuned:
                taken = base_transition(policy, sampler, batch, k, x)
                following = taken.mean if taken.is_deterministic else taken.sample(generator)
            elif (with_grad or reference) and (priced is None or k in priced):
                taken, base = both_transitions(policy, sampler, batch, k, x)
                following = taken.sample(generator)
                kl = kl + taken.kl(base)
                with torch.no_grad():
                    log_ratio += taken.log_ratio(base, following)
            else:
                taken = tuned_transition(policy, sampler, batch, k, x)
                following = taken.sample(generator)
        x = following
        states.append(x)
        stds.append(taken.std)
    return Rollout(tuple(states), kl, log_ratio, tuple(stds))


def start_noise(shape: tuple[int, ...], sampler: Sampler, generator: RandomSource, dtype=torch.float32, device="cpu"):
    """x_0 ~ N(0, init_noise_sigma²), as the pipelines draw it; flow schedulers have no such number, and start from N(0, 1)."""
    scale = getattr(sampler.scheduler, "init_noise_sigma", 1.0)
    return standard_normal(shape, generator, torch.device(device), dtype) * scale


@dataclass(frozen=True)
class Choice:
    """What a batch is to be of, without its noise. label_rows, prompt_rows: (B,). labels: (B, A). gamma: (B,)."""

    label_rows: torch.Tensor
    prompt_rows: torch.Tensor
    labels: torch.Tensor
    gamma: torch.Tensor

    def __getitem__(self, rows: Any) -> Choice:
        return Choice(*(value[rows] for value in vars(self).values()))


def _numbers(scores: torch.Tensor) -> torch.Tensor:
    """The scores of some images, (B,) or (B, M). Raises ValueError where one is NaN."""
    if bad := int(scores.isnan().reshape(len(scores), -1).any(dim=1).sum()):
        raise ValueError(f"The log-likelihood is NaN for {bad} of {len(scores)} images: the reward must give a number for each.")
    return scores


def in_chunks(function: Callable[..., torch.Tensor], size: int | None) -> Callable[..., torch.Tensor]:
    """The same function of tensors (B, …), called with at most `size` rows at a time; `function` itself for None.

    Where a gradient flows, each chunk is computed again in backward: never more than one chunk's activations are in memory, and the
    gradient is the same, as long as a row's result does not depend on the others.
    """
    if size is None:
        return function

    def chunked(*tensors: torch.Tensor) -> torch.Tensor:
        if len(tensors[0]) <= size:
            return function(*tensors)
        parts = zip(*(tensor.split(size) for tensor in tensors), strict=True)
        if torch.is_grad_enabled() and tensors[0].requires_grad:
            return torch.cat([checkpoint(function, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])
        return torch.cat([function(*part) for part in parts])

    return chunked


@dataclass(frozen=True)
class Environment:
    """What is fixed while a policy trains or is judged: the base law's sampler, and what a finished sample is worth.

    Args:
        sampler: the base law's scheduler and settings.
        shape: (C, H, W) of a state.
        reward: images, labels (B, A) -> (B,) log-likelihood in nats.
        labels: (M, A), the labels that are drawn, uniformly; NaN where an attribute is left free.
        spread: (M, A), where continuous labels are drawn: uniformly within so much of the row's; None for no attribute that is.
        space: what the columns of `labels` mean; evaluation takes them for class indices without it.
        gamma: exponent of the likelihood, of every batch but those of `choose` and `draw` where there is a range.
        gamma_range: (low, high); `choose` then draws gamma log-uniformly from it, one for each trajectory.
        decode: states (B, C, *) -> images in [0, 1]; identity by default. Differentiable where the reward is.
        prompt_embeds: (P, L, D) or P rows of a `Condition`, the prompts that are drawn, uniformly; None for an unconditional denoiser.
        null_embeds: (1, L, D), for guidance.
        reward_batch_size: how many states are decoded and scored at a time; None for a whole batch.
    """

    sampler: Sampler
    shape: tuple[int, ...]
    reward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    labels: torch.Tensor
    gamma: float = 1.0
    gamma_range: tuple[float, float] | None = None
    decode: Callable[[torch.Tensor], torch.Tensor] = field(default=lambda x: x)
    prompt_embeds: torch.Tensor | Condition | None = None
    null_embeds: torch.Tensor | None = None
    spread: torch.Tensor | None = None
    space: LabelSpace | None = None
    reward_batch_size: int | None = None

    @property
    def num_prompts(self) -> int:
        return 1 if self.prompt_embeds is None else len(self.prompt_embeds)

    def score(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """log p̂(y | x), (B,) nats, on the labels' device. Raises ValueError where the reward gives anything else, NaN included."""
        return _numbers(self._reward(images, labels))

    def _reward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        found = self.reward(images, labels)
        if not (isinstance(found, torch.Tensor) and found.is_floating_point() and found.shape == (len(images),)):
            what = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
            raise ValueError(f"The reward must give one floating-point log-likelihood an image, ({len(images)},); it gave {what}.")
        return found.to(labels.device)

    def log_likelihood(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """log p̂(y | decode(x)), (B,) nats. A NaN is left in: training, which asks for it, skips the update, on all processes."""
        return in_chunks(lambda x, labels: self._reward(self.decode(x), labels), self.reward_batch_size)(x, labels)

    def scores(self, images: torch.Tensor) -> torch.Tensor:
        """log p̂ of every label of the environment, (B, C, H, W) -> (B, M) nats. Raises as `score` does."""
        return _numbers(self._rewards(images))

    def _rewards(self, images: torch.Tensor) -> torch.Tensor:
        return torch.stack([self._reward(images, label.expand(len(images), -1)) for label in self.labels], dim=1)

    def log_likelihoods(self, x: torch.Tensor) -> torch.Tensor:
        """The same of states, (B, C, *) -> (B, M) nats: decoded once. A NaN is left in, as of states that are not finished."""
        return in_chunks(lambda x: self._rewards(self.decode(x)), self.reward_batch_size)(x)

    def start(self, choice: Choice, generator: RandomSource) -> Batch:
        """The batch of a choice, its x_0 drawn from `generator`."""
        size, device = len(choice.label_rows), self.labels.device
        dtype = torch.float32 if self.prompt_embeds is None else self.prompt_embeds.dtype
        noise = start_noise((size, *self.shape), self.sampler, generator, dtype, device)
        embeds = null = None
        if self.prompt_embeds is not None:
            embeds = self.prompt_embeds[choice.prompt_rows]
        if self.null_embeds is not None:
            null = self.null_embeds.expand(size, -1, -1)
        return Batch(noise, choice.labels, choice.gamma, embeds, null, choice.prompt_rows, choice.label_rows)

    def batch(self, label_rows: torch.Tensor, prompt_rows: torch.Tensor, generator: RandomSource) -> Batch:
        """A batch with labels[label_rows] and prompt_embeds[prompt_rows], its x_0 drawn from `generator`."""
        gamma = torch.full((len(label_rows),), float(self.gamma), device=self.labels.device)
        return self.start(Choice(label_rows, prompt_rows, self.labels[label_rows], gamma), generator)

    def choose(self, size: int, generator: torch.Generator | None) -> Choice:
        """A random choice in which every (label, prompt) pair is as frequent as the next, up to rounding."""
        pairs = len(self.labels) * self.num_prompts
        device = generator.device if generator is not None else "cpu"
        rounds = [torch.randperm(pairs, generator=generator, device=device).cpu() for _ in range(-(-size // pairs))]
        index = torch.cat(rounds)[:size]
        label_rows, prompt_rows = index % len(self.labels), index // len(self.labels)
        labels = self.labels[label_rows]
        if self.spread is not None:
            place = 2 * torch.rand(labels.shape, generator=generator, device=device).to(labels) - 1
            labels = labels + place * self.spread[label_rows]
        return Choice(label_rows, prompt_rows, labels, self.gammas(size, generator))

    def gammas(self, size: int, generator: torch.Generator | None) -> torch.Tensor:
        """(size,): gamma itself, or log-uniform in the range, stratified, so that every batch covers it."""
        gamma = torch.full((size,), float(self.gamma), device=self.labels.device)
        if self.gamma_range is None:
            return gamma
        device = generator.device if generator is not None else "cpu"
        low, high = self.gamma_range
        place = torch.randperm(size, generator=generator, device=device) + torch.rand(size, generator=generator, device=device)
        return (low * (high / low) ** (place / size)).to(gamma)

    def draw(self, size: int, generator: torch.Generator | None) -> Batch:
        """The batch of a random choice, all of it from one generator."""
        return self.start(self.choose(size, generator), generator)

    def grid(self, per_label: int, generator: RandomSource) -> Batch:
        """`per_label` rows of each label, in order of label, each running through the prompts in turn."""
        label_rows = torch.arange(len(self.labels)).repeat_interleave(per_label)
        prompt_rows = torch.arange(per_label).remainder(self.num_prompts).repeat(len(self.labels))
        return self.batch(label_rows, prompt_rows, generator)
