"""Perceptrons of noisy states, fitted to base trajectories; above all the base's own denoised estimate, without a call of it.

What a state will become is known of every state of a trajectory in as many numbers as the state has: the denoiser says it. Whether it will have a label is
one number, and that of one draw. So the first is learned from far fewer trajectories than the second, and a critic that sees the first in place of the
state has only the step from there to the label left to learn (critics.py). It is differentiable, and so is a critic on top of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import nn
from tqdm.auto import tqdm


HIDDEN, LAYERS = 512, 3
WARM_UP, LOOKS = 10, 20  # updates; looks at the held-out loss, in a fit
RATE, BETAS, BATCH, UPDATES = 3e-3, (0.9, 0.98), 256, 3  # of a surrogate; its updates, for each of the critic's


class Perceptron(nn.Module):
    """(x (B, inputs), level (B,), prompt (B,), extra (B, extra)) -> (B, outputs). Level and extra scale and shift what each layer says; a prompt,
    of which there may be thousands, shifts the first."""

    def __init__(self, inputs: int, outputs: int, levels: int, prompts: int, dropout: float = 0.0, extra: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(inputs if i == 0 else HIDDEN, HIDDEN) for i in range(LAYERS))
        self.level, self.prompt = nn.Embedding(levels, 2 * LAYERS * HIDDEN), nn.Embedding(prompts, HIDDEN)
        self.extra = nn.Linear(extra, 2 * LAYERS * HIDDEN, bias=False) if extra else None
        self.out, self.dropped = nn.Linear(HIDDEN, outputs), nn.Dropout(dropout)
        for table in (self.level, self.prompt):
            nn.init.normal_(table.weight, std=0.3)

    def forward(
        self, x: torch.Tensor, level: torch.Tensor, prompt: torch.Tensor, extra: torch.Tensor | None = None
    ) -> torch.Tensor:
        told = self.level(level)
        if self.extra is not None:
            told = told + self.extra(extra)
        scales, shifts = told.unflatten(1, (2, LAYERS, HIDDEN)).unbind(dim=1)
        hidden = self.dropped(F.silu(self.layers[0](x) * (1 + scales[:, 0]) + shifts[:, 0] + self.prompt(prompt)))
        for i, layer in enumerate(self.layers[1:], 1):
            hidden = hidden + self.dropped(F.silu(layer(hidden) * (1 + scales[:, i]) + shifts[:, i]))
        return self.out(hidden)


class Surrogate(nn.Module):
    """The base's denoised estimate (B, d) at states (B, d) of K + 1 levels, both on the coarse grid, less its mean and over its standard deviation.

    states, denoised: (K + 1, n, d), which give the means and standard deviations; those of states for each level.
    """

    def __init__(self, states: torch.Tensor, denoised: torch.Tensor, prompts: int) -> None:
        super().__init__()
        levels, _, size = states.shape
        self.net = Perceptron(size, size, levels, prompts)
        self.gain, self.share = nn.Embedding(levels, size), nn.Embedding(levels, 1)  # of the network, and of the state itself
        nn.init.ones_(self.gain.weight)
        nn.init.zeros_(self.share.weight)
        middle, estimate = states.mean(dim=1), denoised.mean(dim=(0, 1))
        self.register_buffer("middle", middle)
        self.register_buffer("width", (states - middle.unsqueeze(1)).std(dim=(1, 2)).clamp(min=1e-6).unsqueeze(1))
        self.register_buffer("estimate_middle", estimate)
        self.register_buffer("estimate_width", (denoised - estimate).std().clamp(min=1e-6))

    def forward(self, x: torch.Tensor, level: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        x = (x - self.middle[level]) / self.width[level]
        return self.net(x, level, prompt) * self.gain(level) + self.share(level) * x

    def error(self, x: torch.Tensor, level: torch.Tensor, prompt: torch.Tensor, denoised: torch.Tensor) -> torch.Tensor:
        """Mean squared error, as a share of the estimates' variance."""
        return F.mse_loss(self(x, level, prompt), (denoised - self.estimate_middle) / self.estimate_width)


def fit(
    network: nn.Module,
    loss_of: Callable[[], torch.Tensor],
    held_out: Callable[[], float],
    updates: int,
    description: str,
    rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
) -> float:
    """Fits the network, which then has the weights that were best at `held_out`, and is fixed; returns what that was.

    Args:
        loss_of: the loss of a fresh batch. held_out: that of what is not fitted to; it is called now and then, without dropout.

    Raises:
        ValueError: if it was never finite.
    """
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=rate, betas=betas, weight_decay=1e-2)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARM_UP, updates)
    best, kept = math.inf, {}
    network.train()
    for update in (bar := tqdm(range(1, updates + 1), desc=description, unit="update")):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if update % max(1, updates // LOOKS) == 0:
            network.eval()
            with torch.no_grad():
                found = held_out()
            network.train()
            if found < best:
                best, kept = found, {name: value.clone() for name, value in network.state_dict().items()}
            bar.set_postfix(fitted=f"{loss.item():.3f}", held_out=f"{found:.3f}", best=f"{best:.3f}", refresh=False)
    if not kept:
        raise ValueError(
            f"{description}: none of its losses on held-out base trajectories was finite. Give more critic_trajectories and "
            "critic_updates; with critic_trajectories = 0 there is no warm start."
        )
    network.load_state_dict(kept)
    network.eval().requires_grad_(False)
    return best


def fit_surrogate(
    states: torch.Tensor,
    denoised: torch.Tensor,
    prompts: torch.Tensor,
    num_prompts: int,
    held: torch.Tensor,
    updates: int,
    generator: torch.Generator,
) -> tuple[Surrogate, float]:
    """The surrogate of base trajectories, and its error (a share of the variance) on those that it was not fitted to.

    Args:
        states, denoised: (K + 1, n, d), all on one device. prompts: (n,) rows of num_prompts. held: trajectories that are held out.
            updates: of BATCH states each.
    """
    levels, count, device = *states.shape[:2], states.device
    surrogate = Surrogate(states, denoised, num_prompts).to(device)
    chosen = torch.ones(count, dtype=torch.bool, device=device)
    chosen[held] = False
    rows = chosen.nonzero().flatten()

    def loss_of() -> torch.Tensor:
        own = rows[torch.randint(len(rows), (BATCH,), generator=generator, device=device)]
        level = torch.randint(levels, (BATCH,), generator=generator, device=device)
        return surrogate.error(states[level, own], level, prompts[own], denoised[level, own])

    def held_out() -> float:
        return (
            sum(
                surrogate.error(states[k, held], torch.full_like(held, k), prompts[held], denoised[k, held]) for k in range(levels)
            ).item()
            / levels
        )

    return surrogate, fit(surrogate, loss_of, held_out, updates, "critic: the base's estimate", RATE, BETAS)
