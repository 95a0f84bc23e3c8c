"""The Gaussian step p(x_{k+1} | x_k) that a diffusers scheduler takes, as an object with a mean and a standard deviation.

No scheduler exposes these, so they are restated here from the papers and held to `scheduler.step` by tests, over the whole grid of
settings. Sources: DDPM, arXiv 2006.11239 eq. 6-7; DDIM, arXiv 2010.02502 eq. 12 and 16; v-prediction, arXiv 2202.00512.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import singledispatch

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.utils.torch_utils import randn_tensor


def _sum_but_first(value: torch.Tensor) -> torch.Tensor:
    # thousands of dimensions of a nat each: half precision would round the sum to whole nats and worse
    return value.flatten(1).sum(dim=1, dtype=torch.float32 if value.dtype in (torch.float16, torch.bfloat16) else None)


@dataclass(frozen=True)
class Transition:
    """N(mean, std²) over the next state. `mean` (B, *), `std` broadcastable to it; std = 0 means a deterministic step.

    denoised: the estimate of the clean sample that the step was made from, (B, *), clipped where the scheduler clips.
    """

    mean: torch.Tensor
    std: torch.Tensor
    denoised: torch.Tensor | None = None

    @property
    def is_deterministic(self) -> bool:
        """True where the scheduler adds no noise at all: such a step has no density and no KL (std is one number then)."""
        return self.std.numel() == 1 and self.std.item() == 0.0

    def kl(self, other: Transition) -> torch.Tensor:
        """KL(self ‖ other) in nats, summed over dimensions: (B,). For equal std it is ‖Δmean‖² / (2 std²).

        A deterministic step counts 0: the rollouts take it with the base, so that both laws share it (see rollouts.py).
        """
        if self.is_deterministic and other.is_deterministic:
            return _sum_but_first(torch.zeros_like(self.mean))
        if torch.equal(self.std, other.std):
            return _sum_but_first(((self.mean - other.mean) / self.std).square()) / 2
        ratio = (self.std / other.std).square()
        shift = ((self.mean - other.mean) / other.std).square()
        return _sum_but_first((ratio + shift - 1 - ratio.log()).expand_as(self.mean)) / 2

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """log N(x; mean, std²) in nats, summed over dimensions: (B,). Raises ValueError on a deterministic step."""
        if self.is_deterministic:
            raise ValueError("A deterministic step (std = 0) has no density, so no log-probability.")
        normal = ((x - self.mean) / self.std).square() / 2 + self.std.log() + math.log(2 * math.pi) / 2
        return -_sum_but_first(normal.expand_as(self.mean))

    def log_ratio(self, other: Transition, x: torch.Tensor) -> torch.Tensor:
        """log self(x) − log other(x) in nats, (B,) float64: summed difference by difference, which no large sums cancel out of."""
        x, mean, std, other_mean, other_std = (v.double() for v in (x, self.mean, self.std, other.mean, other.std))
        terms = (((x - other_mean) / other_std).square() - ((x - mean) / std).square()) / 2 + other_std.log() - std.log()
        return _sum_but_first(terms.expand_as(mean))

    def sample(
        self, generator: torch.Generator | list[torch.Generator] | None = None, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """mean + std · noise, (B, *); reparametrised, so gradients flow through mean and std."""
        if noise is None:
            noise = randn_tensor(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.std * noise


@singledispatch
def transition(scheduler, output: torch.Tensor, t: int | torch.Tensor, x: torch.Tensor, **kwargs) -> Transition:
    """The transition that `scheduler.step(output, t, x, **kwargs)` samples from.

    Args:
        scheduler: a diffusers scheduler on which `set_timesteps` was called.
        output: the denoiser's output at (x, t), (B, C, *), after guidance.
        t: the current timestep, one for the batch.
        x: the current state, (B, C, *).

    Raises:
        ValueError: if the scheduler takes no Gaussian step (deterministic, or dependent on its history).
    """
    raise ValueError(
        f"{type(scheduler).__name__} has no Gaussian transition that is known here, so no KL and no log-probability. Use "
        f"{' or '.join(sorted(supported_schedulers()))} (with eta > 0), for instance "
        "`pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)`."
    )


def supported_schedulers() -> list[str]:
    """Names of the scheduler classes with a registered transition."""
    return [cls.__name__ for cls in transition.registry if cls is not object]


def _index(t: int | torch.Tensor) -> int:
    return int(t.item()) if isinstance(t, torch.Tensor) else int(t)


def _check_steps(scheduler) -> None:
    if scheduler.num_inference_steps is None:
        raise ValueError(f"Call `set_timesteps` on the {type(scheduler).__name__} before asking for a transition.")


def _alphas(scheduler, x: torch.Tensor) -> torch.Tensor:
    """alphas_cumprod in double precision on the host, so that the coefficients carry no rounding of their own."""
    return scheduler.alphas_cumprod.to("cpu", torch.float64)


def _clean_and_noise(scheduler, output, x, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted clean sample and noise, before clipping (DDIM eq. 12; v: arXiv 2202.00512 appendix D)."""
    a, b = math.sqrt(alpha), math.sqrt(1 - alpha)
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return (x - b * output) / a, output
    if kind == "sample":
        return output, (x - a * output) / b
    if kind == "v_prediction":
        return a * x - b * output, a * output + b * x
    raise ValueError(f"{type(scheduler).__name__} has prediction_type={kind!r}; epsilon, sample and v_prediction are known.")


def _clip(scheduler, clean: torch.Tensor) -> torch.Tensor:
    if scheduler.config.thresholding:
        return scheduler._threshold_sample(clean)
    if scheduler.config.clip_sample:
        return clean.clamp(-scheduler.config.clip_sample_range, scheduler.config.clip_sample_range)
    return clean


@transition.register
def _ddim(
    scheduler: DDIMScheduler,
    output: torch.Tensor,
    t: int | torch.Tensor,
    x: torch.Tensor,
    *,
    eta: float = 1.0,
    use_clipped_model_output: bool = False,
) -> Transition:
    """DDIM eq. 12 with sigma of eq. 16. `eta` = 1 is memoryless, `eta` = 0 deterministic."""
    _check_steps(scheduler)
    alphas, t = _alphas(scheduler, x), _index(t)
    previous = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    alpha = alphas[t].item()
    alpha_previous = alphas[previous].item() if previous >= 0 else float(scheduler.final_alpha_cumprod)
    variance = eta**2 * (1 - alpha_previous) / (1 - alpha) * (1 - alpha / alpha_previous)
    clean, noise = _clean_and_noise(scheduler, output, x, alpha)
    clean = _clip(scheduler, clean)
    if use_clipped_model_output:
        noise = (x - math.sqrt(alpha) * clean) / math.sqrt(1 - alpha)
    # at a terminal signal of ~0 and eta = 1 the direction's weight is 0 up to rounding, which must not go below it
    direction = math.sqrt(max(1 - alpha_previous - variance, 0.0)) * noise
    std = torch.tensor(math.sqrt(max(variance, 0.0)), dtype=x.dtype, device=x.device)
    return Transition(math.sqrt(alpha_previous) * clean + direction, std, clean)


@transition.register
def _ddpm(scheduler: DDPMScheduler, output: torch.Tensor, t: int | torch.Tensor, x: torch.Tensor) -> Transition:
    """DDPM eq. 7, with the scheduler's `variance_type`, the learned ones included."""
    kind = scheduler.variance_type
    alphas, t = _alphas(scheduler, x), _index(t)
    previous = int(scheduler.previous_timestep(t))
    alpha = alphas[t].item()
    alpha_previous = alphas[previous].item() if previous >= 0 else 1.0
    beta = 1 - alpha / alpha_previous
    predicted = None
    if output.shape[1] == 2 * x.shape[1] and kind in ("learned", "learned_range"):
        output, predicted = output.split(x.shape[1], dim=1)
    clean = _clip(scheduler, _clean_and_noise(scheduler, output, x, alpha)[0])
    clean_weight = math.sqrt(alpha_previous) * beta / (1 - alpha)
    state_weight = math.sqrt(1 - beta) * (1 - alpha_previous) / (1 - alpha)
    mean = clean_weight * clean + state_weight * x
    small = max((1 - alpha_previous) / (1 - alpha) * beta, 1e-20)
    if t == 0 or (alpha_previous == 1.0 and kind in ("fixed_small", "fixed_small_log")):
        # onto the clean sample: the posterior variance is 0, and its clamp at 1e-20 is no noise either
        std = torch.zeros((), dtype=x.dtype, device=x.device)
    elif kind in ("fixed_small", "fixed_small_log"):
        std = torch.tensor(math.sqrt(small), dtype=x.dtype, device=x.device)
    elif kind == "fixed_large":
        std = torch.tensor(math.sqrt(beta), dtype=x.dtype, device=x.device)
    elif kind in ("learned", "learned_range") and predicted is not None:
        if kind == "learned":
            std = predicted.clamp_min(0).sqrt()
        else:
            fraction = (predicted + 1) / 2
            std = torch.exp((fraction * math.log(beta) + (1 - fraction) * math.log(small)) / 2)
    else:
        raise ValueError(
            f"DDPMScheduler(variance_type={kind!r}) with this denoiser gives no standard deviation: use fixed_small, "
            "fixed_small_log or fixed_large, or a denoiser that predicts its variance with learned or learned_range."
        )
    return Transition(mean, std, clean)
