"""A critic for a quick start: log h_k(x, y) = log E_pre[p̂(y | x_K)^gamma | x_k = x], learned from samples of the base.

The optimal control is u_k = sigma_k E[∇log h_{k+1}(x_{k+1}) | x_k] to first order in the step (Doob's h-transform), so −∇log h is what
the lean adjoint estimates from one trajectory, with its noise averaged out. Base samples are cheap (one forward a step, no graph),
each serves all labels at once, and the critic is tiny beside the denoiser. States are got from a finished sample by the scheduler's
own forward process, with fresh noise at every update: trained on the few thousand stored trajectories instead, the critic
overfits and its gradients come out far too steep (held-out loss 1.97 against 1.50 at the eleventh of 16 steps of the digits).
The forward process is the base's own law only as far as the base is a perfect model, and h only the first order of the best
control, so the critic is biased: it only starts the training off, and the objectives that do not use it finish. It is thrown away;
nothing of it is needed at inference.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn
from tqdm.auto import tqdm

from .policy import Policy
from .rollouts import Environment, Rollout, rollout


class Value(nn.Module):
    """Small residual network: state, step and prompt -> log h for each of M labels, nats.

    Args:
        channels: C of the state. num_steps: K. num_labels: M. prompt_dim: width of the pooled prompt embedding, 0 without prompts.
    """

    GRID = 4  # states are pooled to GRID x GRID

    def __init__(self, channels: int, num_steps: int, num_labels: int, prompt_dim: int = 0, width: int = 128) -> None:
        super().__init__()
        self.num_steps = num_steps
        self.enter = nn.Linear(channels * self.GRID**2, width)
        self.condition = nn.Sequential(nn.Linear(32 + prompt_dim, width), nn.SiLU())
        self.film = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(3))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(3))
        self.leave = nn.Linear(width, num_labels)

    def forward(self, x: torch.Tensor, k: torch.Tensor, prompt: torch.Tensor | None) -> torch.Tensor:
        """x: (B, C, H, W). k: (B,) step index. prompt: (B, prompt_dim). Returns (B, M) log h."""
        hidden = self.enter(F.adaptive_avg_pool2d(x, self.GRID).flatten(1))
        time = get_timestep_embedding(k.float() / self.num_steps * 1000, 32)
        condition = self.condition(time if prompt is None else torch.cat([time, prompt], dim=1))
        for film, norm, block in zip(self.film, self.norms, self.blocks, strict=True):
            scale, shift = film(condition).chunk(2, dim=1)
            hidden = hidden + block(norm(hidden) * (1 + scale) + shift)
        return self.leave(hidden)


def _pooled(prompt_embeds: torch.Tensor | None) -> torch.Tensor | None:
    """One vector a prompt, (B, L·D): the embeddings side by side, which tells any two prompts apart."""
    return None if prompt_embeds is None else prompt_embeds.flatten(1).float()


def fit_value(
    policy: Policy,
    environment: Environment,
    num_samples: int,
    generator: torch.Generator,
    *,
    updates: int = 1500,
    batch_size: int = 256,
    learning_rate: float = 3e-3,
    weight_decay: float = 1.0,
    rollout_batch: int = 128,
    progress: bool = True,
) -> Value:
    """Draws base samples and fits h by its proper loss, h − p̂^gamma log h, whose minimum is the conditional mean of p̂^gamma."""
    clean, prompts, targets = [], [], []
    scheduler, timesteps = environment.sampler.scheduler, environment.sampler.timesteps
    steps = len(timesteps)
    bar = tqdm(total=num_samples, desc="samples for the critic", unit="image", disable=not progress)
    with torch.no_grad():
        for start in range(0, num_samples, rollout_batch):
            batch = environment.draw(min(rollout_batch, num_samples - start), generator)
            path = rollout(policy, environment.sampler, batch, generator, tuned=False)
            images = environment.decode(path.sample)
            rewards = [environment.reward(images, row.expand(len(batch), -1)) for row in environment.labels]
            targets.append((environment.gamma * torch.stack(rewards, dim=1)).exp().float())
            clean.append(path.sample.float())
            prompts.append(batch.prompts)
            bar.update(len(batch))
    bar.close()
    clean, prompts, targets = torch.cat(clean), torch.cat(prompts), torch.cat(targets)
    table = _pooled(environment.prompt_embeds)
    device = clean.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator, device=generator.device)))
        value = Value(environment.shape[0], steps, len(environment.labels), 0 if table is None else table.shape[1]).to(device)
    optimizer = torch.optim.AdamW(value.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    bar = tqdm(range(updates), desc="critic", unit="update", disable=not progress)
    for update in bar:
        rows = torch.randint(len(clean), (batch_size,), generator=generator, device=generator.device)
        k = torch.randint(0, steps + 1, (batch_size,), generator=generator, device=generator.device)
        noise = torch.randn(clean[rows].shape, generator=generator, device=generator.device)
        noised = scheduler.add_noise(clean[rows], noise, timesteps.to(device)[k.clamp(max=steps - 1)])
        finished = (k == steps).view(-1, *[1] * (clean.ndim - 1))
        log_h = value(torch.where(finished, clean[rows], noised), k, None if table is None else table[prompts[rows]])
        loss = (log_h.clamp(max=5).exp() - targets[rows] * log_h).sum(dim=1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if update % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    bar.close()
    return value.eval().requires_grad_(False)


def value_adjoint(value: Value, environment: Environment, label_rows: torch.Tensor, prompts: torch.Tensor | None):
    """The critic's stand-in for the lean adjoint along a trajectory: k, trajectory -> −∇log h_k(x_k, y), (B, C, *)."""
    table = _pooled(environment.prompt_embeds)
    prompt = None if table is None else table[prompts]

    def adjoint(k: int, trajectory: Rollout) -> torch.Tensor:
        with torch.enable_grad():
            x = trajectory.states[k].detach().float().requires_grad_()
            log_h = value(x, torch.full((len(x),), k, device=x.device), prompt)
            (gradient,) = torch.autograd.grad(log_h.gather(1, label_rows[:, None]).sum(), x)
        return -gradient.to(trajectory.states[k])

    return adjoint
