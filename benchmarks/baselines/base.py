"""The pre-trained pipeline as the baselines see it: prompts, one noise level at a time, denoised estimates, images; and what was spent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from diffusers_ctrl.bases import denoiser_of
from diffusers_ctrl.conditions import Condition
from diffusers_ctrl.decoding import Decoder, decoder
from diffusers_ctrl.recording import record_conditions
from diffusers_ctrl.rollouts import Sampler
from diffusers_ctrl.transitions import Transition


Likelihood = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # images (n, C, H, W), labels (n, A) -> log p̂ (n,), nats


@dataclass
class Base:
    """calls: rows that the denoiser was called with, `forward`, and those that it was differentiated for, `backward`.

    kl: while somebody asks (`pricing`), what the steps taken so far cost over the base's own, (n,) nats.
    """

    pipe: DiffusionPipeline
    sampler: Sampler
    conditions: Condition
    decode: Decoder
    calls: Counter = field(default_factory=Counter)
    kl: torch.Tensor | None = None

    @property
    def steps(self) -> int:
        return self.sampler.num_inference_steps

    @property
    def predicts_v(self) -> bool:
        return self.sampler.scheduler.config.prediction_type == "v_prediction"

    def levels(self, k: int) -> tuple[float, float]:
        """Signal and noise (alpha, sigma) of the states that step k starts from; alpha² + sigma² = 1."""
        alpha2 = self.sampler.scheduler.alphas_cumprod[int(self.sampler.timesteps[k])].item() if k < self.steps else 1.0
        return alpha2**0.5, (1 - alpha2) ** 0.5

    def start(self, n: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(n, *self.conditions.shape, generator=generator)

    def output(self, x: torch.Tensor, k: int, prompts: torch.Tensor) -> torch.Tensor:
        """The base's output at states x (n, *) of step k."""
        self.calls["forward"] += len(x)
        self.calls["backward"] += len(x) * (torch.is_grad_enabled() and x.requires_grad)
        denoiser = denoiser_of(self.pipe)[1]

        def call(args, kwargs, _):
            return denoiser(*args, **kwargs)[0]

        return self.conditions[prompts].output(call, x, self.sampler.timesteps[k], None)

    def clean(self, x: torch.Tensor, k: int, prompts: torch.Tensor) -> torch.Tensor:
        """E[x_clean | x] as the base estimates it."""
        (alpha, sigma), output = self.levels(k), self.output(x, k, prompts)
        return alpha * x - sigma * output if self.predicts_v else (x - sigma * output) / alpha

    def step(self, x: torch.Tensor, clean: torch.Tensor, k: int) -> Transition:
        """The sampler's step from x, were `clean` what the denoiser had said."""
        alpha, sigma = self.levels(k)
        output = (alpha * x - clean) / sigma if self.predicts_v else (x - alpha * clean) / sigma
        return self.sampler.transition(output, self.sampler.timesteps[k], x)

    @contextmanager
    def pricing(self, n: int) -> Iterator[None]:
        """Within the block a method that steps through `price` has the KL of its n trajectories to the base's in `kl`."""
        self.kl, calls = torch.zeros(n), self.calls.copy()
        try:
            yield
        finally:
            self.kl, self.calls = None, calls

    def price(self, mean: torch.Tensor, x: torch.Tensor, k: int, prompts: torch.Tensor) -> None:
        """Notes a step from x to N(mean, std²) in place of the base's. Infinite where the base's has no noise and the mean is another."""
        if self.kl is None:
            return
        with torch.no_grad():
            own = self.step(x, self.clean(x, k, prompts), k)
        apart = (mean - own.mean).square().flatten(1).sum(dim=1)
        if own.is_deterministic:
            self.kl = self.kl + torch.where(apart > 1e-10 * own.mean.square().flatten(1).sum(dim=1), torch.inf, 0.0)
        else:
            self.kl = self.kl + apart / (2 * torch.as_tensor(own.std).flatten()[0] ** 2)

    def draw(self, prompts: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Images of the base itself."""
        x = self.start(len(prompts), generator)
        with torch.no_grad():
            for k in range(self.steps):
                x = drawn(self.step(x, self.clean(x, k, prompts), k), generator)
            return self.decode(x)


@dataclass(frozen=True)
class Labelled:
    """The labelled images as the trained baselines learn from them. latents: (N, *); labels: (N, A), NaN where unknown; prompts: (N,)."""

    latents: torch.Tensor
    labels: torch.Tensor
    prompts: torch.Tensor


def encode(base: Base, images: torch.Tensor) -> torch.Tensor:
    """Latents of images (N, C, H, W) in [0, 1]."""
    vae = base.pipe.vae
    with torch.no_grad():
        parts = [vae.encode(part * 2 - 1).latent_dist.mean for part in images.split(64)]
    return torch.cat(parts) * vae.config.scaling_factor


def noised(base: Base, clean: torch.Tensor, t: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Clean latents (n, *) taken to timesteps t (n,), and what the denoiser should answer there."""
    alpha2 = base.sampler.scheduler.alphas_cumprod[t].view(-1, *[1] * (clean.ndim - 1))
    alpha, sigma = alpha2.sqrt(), (1 - alpha2).sqrt()
    noise = torch.randn(clean.shape, generator=generator)
    return alpha * clean + sigma * noise, alpha * noise - sigma * clean if base.predicts_v else noise


def drawn(step: Transition, generator: torch.Generator) -> torch.Tensor:
    return step.mean if step.is_deterministic else step.sample(generator)


def open_base(pipe: DiffusionPipeline, prompts: list[str], steps: int) -> Base:
    """Raises ValueError for a scheduler that is not DDIM on a variance-preserving schedule."""
    if not isinstance(pipe.scheduler, DDIMScheduler) or pipe.scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError("The baselines are written for DDIMScheduler with epsilon or v prediction.")
    pipe.set_progress_bar_config(disable=True)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False)
    conditions = record_conditions(pipe, prompts, num_inference_steps=steps, guidance_scale=1.0)
    return Base(pipe, Sampler(pipe.scheduler, steps, {"eta": 1.0}, conditions.grid), conditions, decoder(pipe))
