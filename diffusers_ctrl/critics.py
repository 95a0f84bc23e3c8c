"""A warm start for the control head: what a label is worth at every noise level, learned from base samples, and its gradient as the control.

The optimum of J (objectives.py) moves each step of the base by

    u_k = sigma_k ∇log h_{k+1}(x),     h_k(x) = E_pre[p̂(y | x_K)^gamma | x_k = x],

to first order in the step's size. h is the base's own, whatever the policy: a perceptron fitted to the states of base trajectories, whose ends' p̂ is
known, finds it without any reinforcement learning (the minimizer of binary cross-entropy against p̂^gamma in [0, 1] is its expectation). It sees
a state by a surrogate's estimate of what the base makes of it (surrogates.py). The control head is then regressed on that control, on the same
trajectories: a target without noise, where a trajectory's own adjoint is mostly noise, and without calls of the denoiser, whose answers are kept.
Drawn in proportion to p̂^gamma, base trajectories are those of the exact law, where the head is to be right. What first order and the perceptron leave over is the objective's to learn: nothing here enters the certificate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import nn
from tqdm.auto import tqdm

from .heads import LABEL_WIDTH, coarse_grid, seen
from .label_encoder import place_in_range
from .paths import parts
from .policy import Answer, Policy
from .randomness import global_generators_kept, seed_global_generators
from .rollouts import Batch, Choice, Environment, base_transition, tuned_transition
from .surrogates import LOOKS, UPDATES, WARM_UP, Perceptron, Surrogate, fit, fit_surrogate
from .transitions import Transition, sum_but_first


DROPOUT = 0.3
AT_A_TIME, FIT_BATCH, ROWS_A_STEP, STEPS_AT_A_TIME = 250, 512, 100, 5
FIT_RATE, HEAD_RATE, TABLE_RATE = 1e-3, 2e-3, 1e-2
KEPT = 4_000  # trajectories whose answers are kept, at most
EXACT = 0.7  # share of the head's lessons that are at the exact law's states; the rest at any


class Critic(nn.Module):
    """logit h of each of `labels` labels at x_k, (B, labels), by the surrogate's estimate of what x_k will become. gamma_range: (low, high)."""

    def __init__(
        self,
        grid: tuple[int, int, int],
        surrogate: Surrogate,
        levels: int,
        prompts: int,
        labels: int,
        gamma_range: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.grid, self.gamma_range, self.surrogate = grid, gamma_range, surrogate
        self.net = Perceptron(math.prod(grid), labels, levels, prompts, DROPOUT, extra=2 if gamma_range else 0)

    def forward(self, x: torch.Tensor, level: torch.Tensor, prompt: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        """x (B, C, H, W), level (B,), prompt (B,), gamma (B,) -> (B, labels)."""
        return self.of_seen(seen(x.float(), self.grid), level, prompt, gamma)

    def of_seen(self, x: torch.Tensor, level: torch.Tensor, prompt: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        """The same of x on the coarse grid, (B, C·h·w)."""
        told = None
        if self.gamma_range is not None:
            place = place_in_range(gamma.float(), self.gamma_range).unsqueeze(1)
            told = torch.cat([place, place.square()], dim=1)
        return self.net(self.surrogate(x, level, prompt), level, prompt, told)


@dataclass(frozen=True)
class Pool:
    """Base trajectories: their states on the coarse grid (K + 1, n, C·h·w), prompt rows (n,), log p̂ of each label at their ends (n, M) nats.

    denoised: the base's estimate of the end at each state, on the coarse grid too, (K + 1, n, C·h·w): at the last that state itself.
    kept: {noisy step k: states (m, C, H, W), what the denoiser answered to them} of the first m trajectories, on the CPU.
    """

    states: torch.Tensor
    denoised: torch.Tensor
    prompts: torch.Tensor
    scores: torch.Tensor
    kept: dict[int, tuple[torch.Tensor, list[Answer]]]

    @property
    def num_kept(self) -> int:
        """m."""
        return len(next(iter(self.kept.values()))[0])

    @cached_property
    def of_prompts(self) -> torch.Tensor:
        """(P, L) the kept trajectories of each prompt, the end of a shorter line filled with -1."""
        prompts = self.prompts[: self.num_kept]
        lines = [(prompts == prompt).nonzero().flatten() for prompt in range(int(prompts.max()) + 1)]
        return nn.utils.rnn.pad_sequence(lines, batch_first=True, padding_value=-1)


def check_critic(environment: Environment, policy: Policy) -> None:
    """Raises ValueError where a warm start cannot be had: no control head, no images, or numbers as labels."""
    if policy.label_encoder.control_head is None:
        raise ValueError(
            "critic_trajectories is a warm start of the control head, which this policy has not: Policy(control_head=512, shape=…)."
        )
    coarse_grid(environment.shape)
    if environment.spread is not None:
        raise ValueError("critic_trajectories needs labels that are classes, not numbers: leave it at 0.")
    encoder = policy.label_encoder
    embedded = [table.unflatten(1, (encoder.gamma_terms, -1))[..., :-LABEL_WIDTH] for table in encoder.tables]
    if any(bool(value.any()) for value in (*policy.lora_up(), *embedded)):
        raise ValueError("critic_trajectories is for a fresh policy: this one's LoRA or label embedding is not zero any more.")


def _parts(total: int, environment: Environment, generator: torch.Generator, at_a_time: int, description: str) -> Iterator[Batch]:
    """`total` trajectories' starts, `at_a_time`; all of a batch is on its noise's device."""
    with tqdm(total=total, desc=description, unit="trajectory") as bar:
        for start in range(0, total, at_a_time):
            batch = environment.draw(min(at_a_time, total - start), generator)
            labels = batch.label_rows.to(batch.noise.device)
            prompts = torch.zeros_like(labels) if batch.prompts is None else batch.prompts.to(labels)
            yield replace(batch, label_rows=labels, prompts=prompts)
            bar.update(len(batch))


@torch.no_grad()
def base_pool(policy: Policy, environment: Environment, count: int, generator: torch.Generator, at_a_time: int = AT_A_TIME) -> Pool:
    """`count` base trajectories, their ends scored for every label; of at most KEPT of them also what the denoiser answered.

    Raises:
        ValueError: where log p̂ is not a log-probability, or the scheduler's transition gives no denoised estimate.
    """
    sampler, grid = environment.sampler, coarse_grid(environment.shape)
    levels, done = len(sampler.timesteps) + 1, 0
    rows: list[tuple[torch.Tensor, torch.Tensor]] = []
    kept: dict[int, list[tuple[torch.Tensor, list[Answer]]]] = {k: [] for k in sampler.noisy_steps}
    states, denoised = (torch.empty(levels, count, math.prod(grid), device=environment.labels.device) for _ in range(2))
    for batch in _parts(count, environment, generator, at_a_time, "critic: base samples"):
        x, own = batch.noise, slice(done, done + len(batch))
        states[0, own] = seen(x.float(), grid)
        for k in range(levels - 1):
            with policy.noted() as answers:
                base = base_transition(policy, sampler, batch, k, x)
            if base.denoised is None:
                name = type(sampler.scheduler).__name__
                raise ValueError(f"The transition of {name} gives no denoised estimate, which critic_trajectories needs.")
            if done < KEPT and k in kept:
                kept[k].append(_first(x, answers, min(KEPT - done, len(batch))))
            denoised[k, own] = seen(base.denoised.float(), grid)
            x = base.mean if base.is_deterministic else base.sample(generator)
            states[k + 1, own] = seen(x.float(), grid)
        done += len(batch)
        scores = environment.log_likelihoods(x).float()
        if wrong := int((~scores.isfinite() | (scores > 1e-4)).sum()):
            raise ValueError(
                f"critic_trajectories needs log-probabilities, finite and at most 0: {wrong} of {scores.numel()} that the reward gave are not."
            )
        rows.append((batch.prompts, scores))
    denoised[-1] = states[-1]
    joined = {k: _joined(kept.pop(k)) for k in sampler.noisy_steps}  # one step after another: all twice would be too much
    return Pool(states, denoised, *(torch.cat(column) for column in zip(*rows, strict=True)), joined)


def _first(x: torch.Tensor, answers: list[Answer], count: int) -> tuple[torch.Tensor, list[Answer]]:
    """The first `count` of a batch's states, and what the denoiser answered to them, on the CPU."""
    rows, cpu = torch.arange(count), torch.device("cpu")
    return x[:count].cpu(), [_of_rows((output.cpu(), time.cpu()), rows, len(x), cpu) for output, time in answers]


def _joined(batches: list[tuple[torch.Tensor, list[Answer]]]) -> tuple[torch.Tensor, list[Answer]]:
    """States and answers of several batches as those of one."""
    states, calls = zip(*batches, strict=True)

    def joined(values: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Each is (n, …), or (2n, …) of a guided batch, half after half."""
        halves = len(values[0]) // len(states[0])
        return torch.cat([value.unflatten(0, (halves, -1)) for value in values], dim=1).flatten(0, 1)

    answers = []
    for call in zip(*calls, strict=True):
        outputs, times = zip(*call, strict=True)
        answers.append((joined(outputs), times[0] if len(times[0]) == 1 else joined(times)))
    return torch.cat(states), answers


def fit_critic(environment: Environment, pool: Pool, updates: int, generator: torch.Generator) -> tuple[Critic, dict[str, float]]:
    """log h from the pool's states of all levels; for a range of gamma, each at a random gamma. First the surrogate that it sees through.

    Returns:
        The critic, with the weights that were best on the tenth of the trajectories that it was not fitted to; {"surrogate_error": see
        `fit_surrogate`, "critic_loss": binary cross-entropy, nats, mean over labels and levels}, both there.
    """
    levels, count, device = *pool.states.shape[:2], pool.states.device
    order = torch.randperm(count, generator=generator, device=device)
    held, rows = order[: count // 10], order[count // 10 :]
    surrogate, error = fit_surrogate(
        pool.states, pool.denoised, pool.prompts, environment.num_prompts, held, UPDATES * updates, generator
    )
    sizes = (levels, environment.num_prompts, pool.scores.shape[1])
    critic = Critic(coarse_grid(environment.shape), surrogate, *sizes, environment.gamma_range).to(device)

    def loss_of(own: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        gamma = environment.gammas(len(own), generator)
        target = (gamma.unsqueeze(1) * pool.scores[own]).exp().clamp(max=1)
        return F.binary_cross_entropy_with_logits(critic.of_seen(pool.states[level, own], level, pool.prompts[own], gamma), target)

    def fresh() -> torch.Tensor:
        own = rows[torch.randint(len(rows), (FIT_BATCH,), generator=generator, device=device)]
        return loss_of(own, torch.randint(levels, (FIT_BATCH,), generator=generator, device=device))

    def held_out() -> float:
        return (sum(loss_of(held, torch.full_like(held, level)) for level in range(levels)) / levels).item()

    loss = fit(critic, fresh, held_out, updates, "critic: fit", FIT_RATE)
    return critic, {"surrogate_error": error, "critic_loss": loss}


def critic_control(critic: Critic, base: Transition, k: int, batch: Batch) -> torch.Tensor:
    """u_k = sigma_k ∇log h_{k+1} at the mean of the base's step, (B, C, H, W)."""
    with torch.enable_grad(), torch.autocast(base.mean.device.type, enabled=False):
        mean = base.mean.detach().float().requires_grad_()
        log_h = F.logsigmoid(critic(mean, torch.full_like(batch.label_rows, k + 1), batch.prompts, batch.gamma))
        (gradient,) = torch.autograd.grad(log_h.gather(1, batch.label_rows.unsqueeze(1)).sum(), mean)
    return torch.as_tensor(base.std).to(gradient) * gradient


def _lesson(environment: Environment, pool: Pool, rows: int, generator: torch.Generator) -> tuple[torch.Tensor, Batch]:
    """Which of the kept trajectories to learn from, (rows,), and for which labels and gammas: most in proportion to p̂^gamma among those of a prompt,
    so that pairs of prompt and label come alike, as in training."""
    device = pool.scores.device
    label_rows = torch.randint(pool.scores.shape[1], (rows,), generator=generator, device=device)
    gamma = environment.gammas(rows, generator)
    any_one = torch.randint(pool.num_kept, (rows,), generator=generator, device=device)
    alike = pool.of_prompts[pool.prompts[any_one]]
    scores = pool.scores[alike, label_rows.unsqueeze(1)]
    weights = (gamma.unsqueeze(1) * scores).masked_fill(alike < 0, -torch.inf).softmax(dim=1)
    exact = torch.rand(rows, generator=generator, device=device) < EXACT
    drawn = alike.gather(1, weights.multinomial(1, generator=generator)).squeeze(1)
    chosen = torch.where(exact, drawn, any_one)
    prompts = pool.prompts[chosen]
    batch = environment.start(Choice(label_rows, prompts, environment.labels[label_rows], gamma), generator)
    return chosen, replace(batch, label_rows=label_rows, prompts=prompts)


def learn_control(
    policy: Policy, environment: Environment, critic: Critic, pool: Pool, updates: int, generator: torch.Generator
) -> float:
    """Regresses the control head on the critic's control at kept states, Σ_k ½‖u_k − target‖² nats; LoRA and the label in the time embedding
    stay as they are, and the denoiser is not called.

    Returns:
        That loss, as it was at the end.
    """
    sampler, device = environment.sampler, environment.labels.device
    groups = policy.trainable_parameters()
    rates = {"control_head": HEAD_RATE, "label_encoder": TABLE_RATE}
    optimizer = torch.optim.AdamW(
        [{"params": groups[name], "lr": rate} for name, rate in rates.items()], betas=(0.9, 0.99), weight_decay=0.0
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, WARM_UP, updates)
    smooth, noisy, steps = None, list(pool.kept), torch.Generator().manual_seed(generator.initial_seed())
    for update in (bar := tqdm(range(updates), desc="critic: control head", unit="update")):
        loss = torch.zeros((), device=device)
        chosen, every = _lesson(environment, pool, STEPS_AT_A_TIME * ROWS_A_STEP, generator)
        chosen = chosen.cpu()  # where the states are; the only synchronisation of an update
        for part in parts(len(every), ROWS_A_STEP):
            k = noisy[int(torch.randint(len(noisy), (), generator=steps))]
            (states, answers), rows, batch = pool.kept[k], chosen[part], every[part]
            x, own = states[rows].to(device), [_of_rows(answer, rows, len(states), device) for answer in answers]
            with torch.no_grad(), policy.known(own):
                base = base_transition(policy, sampler, batch, k, x)
            target = critic_control(critic, base, k, batch)
            with policy.uncheckpointed(), policy.known(own):
                taken = tuned_transition(policy, sampler, batch, k, x)
            apart = (taken.mean.float() - base.mean.float()) / taken.std - target
            loss = loss + len(noisy) / STEPS_AT_A_TIME * sum_but_first(apart.square()).mean() / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        smooth = loss.detach() if smooth is None else torch.lerp(smooth, loss.detach(), 0.02)
        if update % max(1, updates // LOOKS) == 0:
            bar.set_postfix(nats_off=f"{smooth.item():.3f}", refresh=False)
    optimizer.zero_grad(set_to_none=True)
    return smooth.item()


def _of_rows(answer: Answer, rows: torch.Tensor, count: int, device: torch.device) -> Answer:
    """A denoiser's answer to these rows of a batch of `count`, in each part of a guided batch."""
    output, time = answer
    every = torch.cat([rows + part * count for part in range(len(output) // count)])
    return output[every].to(device), (time if len(time) == 1 else time[every]).to(device)


def warm_start(
    policy: Policy, environment: Environment, trajectories: int, updates: int, seed: int, at_a_time: int = AT_A_TIME
) -> dict[str, float]:
    """Base samples, critic, control head: see above. Changes the policy's control head and its label embedding.

    Args:
        trajectories: base samples that the critic is fitted to; the first 4,000 give the head's states. updates: of the critic, and of the head; the
            surrogate gets three times as many.
        at_a_time: trajectories that are drawn together.

    Returns:
        {"surrogate_error", "critic_loss", see `fit_critic`; "head_nats_off", see `learn_control`}: nothing that the certificate rests on.

    Raises:
        ValueError: see `check_critic` and `base_pool`.
    """
    check_critic(environment, policy)
    generator = torch.Generator(environment.labels.device).manual_seed(seed)
    with global_generators_kept():
        seed_global_generators(seed)  # for the critic's first weights, and a scorer that draws
        pool = base_pool(policy, environment, trajectories, generator, at_a_time)
        # autocast keeps its half-precision copies of weights until it ends, here longer than the weights stay what they were
        with torch.autocast(environment.labels.device.type, enabled=False):
            critic, losses = fit_critic(environment, pool, updates, generator)
            pool = replace(pool, states=pool.states[:0], denoised=pool.denoised[:0])  # the head needs neither, and they are large
            off = learn_control(policy, environment, critic, pool, updates, generator)
    return {**losses, "head_nats_off": off}
