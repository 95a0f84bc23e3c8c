"""The Gaussian step p(x_{k+1} | x_k) that a diffusers scheduler takes, as an object with a mean and a standard deviation.

No scheduler exposes these, so they are restated here from the papers and held to `scheduler.step` by tests, over the whole grid of
settings. Sources: DDPM, arXiv 2006.11239 eq. 6-7; DDIM, arXiv 2010.02502 eq. 12 and 16; v-prediction, arXiv 2202.00512; SDE-DPM-Solver++,
arXiv 2211.01095; ancestral sampling with sigmas, arXiv 2011.13456 appendix F.

Memoryless means that x_0 tells nothing about x_K under the base, which the optimum needs in order to be p(x) p(y | x)^gamma / Z. Of the steps
here DDIM with eta = 1, DDPM, EulerAncestral and SDE-DPM-Solver++ of order 1 draw the next state from its law given the present one and the
estimated clean sample: what is left of x_0 is the signal that the pre-trained model itself has at its first timestep (`start_snr`), none where
that is pure noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from .randomness import RandomSource, standard_normal
from .schedulers import MemorylessFlowMatchScheduler, check_direction, posterior_coefficients


def sum_but_first(value: torch.Tensor) -> torch.Tensor:
    """(B, *) -> (B,), half precision summed in float32."""
    # thousands of dimensions of a nat each: half precision would round the sum to whole nats and worse
    return value.flatten(1).sum(dim=1, dtype=torch.float32 if value.dtype in (torch.float16, torch.bfloat16) else None)


@dataclass(frozen=True)
class Transition:
    """N(mean, std²) over the next state. `mean` (B, *), `std` broadcastable to it; std = 0 means a deterministic step.

    A std that is one number is kept on the host, so that what is asked of it does not wait for the device.
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
            return sum_but_first(torch.zeros_like(self.mean))
        # a square of half precision is infinite from 256 on
        every = (self.mean, self.std, other.mean, other.std)
        mean, std, other_mean, other_std = (v.to(torch.promote_types(v.dtype, torch.float32)) for v in every)
        if torch.equal(std, other_std):
            return sum_but_first(((mean - other_mean) / std).square()) / 2
        ratio = (std / other_std).square()
        shift = ((mean - other_mean) / other_std).square()
        return sum_but_first((ratio + shift - 1 - ratio.log()).expand_as(mean)) / 2

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """log N(x; mean, std²) in nats, summed over dimensions: (B,). Raises ValueError on a deterministic step."""
        if self.is_deterministic:
            raise ValueError("A deterministic step (std = 0) has no density, so no log-probability.")
        normal = ((x - self.mean) / self.std).square() / 2 + self.std.log() + math.log(2 * math.pi) / 2
        return -sum_but_first(normal.expand_as(self.mean))

    def log_ratio(self, other: Transition, x: torch.Tensor) -> torch.Tensor:
        """log self(x) − log other(x) in nats, (B,) float64: summed difference by difference, which no large sums cancel out of."""
        x, mean, std, other_mean, other_std = (v.double() for v in (x, self.mean, self.std, other.mean, other.std))
        terms = (((x - other_mean) / other_std).square() - ((x - mean) / std).square()) / 2 + other_std.log() - std.log()
        return sum_but_first(terms.expand_as(mean))

    def sample(self, generator: RandomSource = None, noise: torch.Tensor | None = None) -> torch.Tensor:
        """mean + std · noise, (B, *); reparametrised, so gradients flow through mean and std."""
        if noise is None:
            noise = standard_normal(self.mean.shape, generator, self.mean.device, self.mean.dtype)
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
    raise ValueError(_refusal(scheduler))


def supported_schedulers() -> list[str]:
    """Names of the scheduler classes with a registered transition. Some of their settings may still have none: `is_supported`."""
    return [cls.__name__ for cls in transition.registry if cls is not object]


def scheduler_class(name: str) -> type:
    """The scheduler class of a name in `supported_schedulers`, whether it is diffusers' or ours. Raises ValueError for another name."""
    for cls in transition.registry:
        if cls is not object and cls.__name__ == name:
            return cls
    raise ValueError(f"There is no scheduler {name!r} with a known transition: use one of {', '.join(supported_schedulers())}.")


# why the steps of others are not Gaussian given the state; the classes are diffusers'
_NO_NOISE = "takes steps without noise"
_HISTORY = "takes steps that depend on earlier outputs of the denoiser"
_REASONS = {
    **dict.fromkeys(("EulerDiscreteScheduler", "DDIMInverseScheduler", "EDMEulerScheduler"), _NO_NOISE),
    **dict.fromkeys(
        (
            "HeunDiscreteScheduler",
            "FlowMatchHeunDiscreteScheduler",
            "KDPM2DiscreteScheduler",
            "KDPM2AncestralDiscreteScheduler",
            "PNDMScheduler",
            "IPNDMScheduler",
            "LMSDiscreteScheduler",
            "DEISMultistepScheduler",
            "UniPCMultistepScheduler",
            "DPMSolverSinglestepScheduler",
            "DPMSolverSDEScheduler",
            "SASolverScheduler",
            "EDMDPMSolverMultistepScheduler",
            "CosineDPMSolverMultistepScheduler",
        ),
        _HISTORY,
    ),
}


def _refusal(scheduler: Any) -> str:
    """Why this class has no transition, and which scheduler to take in its place."""
    name = type(scheduler).__name__
    reason = _REASONS.get(name, "has no Gaussian transition that is known here")
    if name.startswith("FlowMatch") or getattr(scheduler, "config", {}).get("prediction_type") == "flow_prediction":
        instead, others = "MemorylessFlowMatchScheduler", "FlowMatchEulerDiscreteScheduler (with stochastic_sampling=True)"
    else:
        instead = "DDIMScheduler (with eta > 0)"
        others = "DDPMScheduler, EulerAncestralDiscreteScheduler or DPMSolverMultistepScheduler (sde-dpmsolver++ of solver_order 1)"
    return (
        f"{name} {reason}, so there is no KL and no log-probability: use {instead}, {others}, for instance "
        f"`pipe.scheduler = {instead.split()[0]}.from_config(pipe.scheduler.config)`."
    )


def is_supported(scheduler: Any) -> bool:
    """Whether this scheduler, with its settings, takes Gaussian steps. Nothing of the scheduler changes."""
    try:
        _check_settings(scheduler)
    except ValueError:
        return False
    return True


@singledispatch
def _check_settings(scheduler: Any) -> None:
    """Raises ValueError, with the setting to change, where no timestep of this scheduler could have a Gaussian step."""
    raise ValueError(_refusal(scheduler))


@_check_settings.register(DDIMScheduler)
@_check_settings.register(DDPMScheduler)
def _(scheduler: DDIMScheduler | DDPMScheduler) -> None:
    pass


@_check_settings.register
def _(scheduler: EulerAncestralDiscreteScheduler) -> None:
    _check_prediction(scheduler, ("epsilon", "v_prediction"))


@_check_settings.register
def _(scheduler: DPMSolverMultistepScheduler) -> None:
    kind, order = scheduler.config.algorithm_type, scheduler.config.solver_order
    if kind not in ("sde-dpmsolver++", "sde-dpmsolver"):
        raise ValueError(
            f"DPMSolverMultistepScheduler with algorithm_type={kind!r} {_NO_NOISE}: use algorithm_type='sde-dpmsolver++' and "
            "solver_order=1, for instance `DPMSolverMultistepScheduler.from_config(config, algorithm_type='sde-dpmsolver++', solver_order=1)`."
        )
    if order != 1:
        raise ValueError(f"DPMSolverMultistepScheduler with solver_order={order} {_HISTORY}: use solver_order=1.")
    _check_prediction(scheduler, ("epsilon", "sample", "v_prediction", *(["flow_prediction"] if kind.endswith("++") else [])))


@_check_settings.register
def _(scheduler: FlowMatchEulerDiscreteScheduler) -> None:
    if not scheduler.config.stochastic_sampling:
        raise ValueError(
            f"FlowMatchEulerDiscreteScheduler with stochastic_sampling=False {_NO_NOISE}: use MemorylessFlowMatchScheduler, for instance "
            "`pipe.scheduler = MemorylessFlowMatchScheduler.from_config(pipe.scheduler.config)`, or stochastic_sampling=True."
        )
    check_direction(scheduler)


@_check_settings.register
def _(scheduler: MemorylessFlowMatchScheduler) -> None:
    check_direction(scheduler)


def _check_prediction(scheduler: Any, known: tuple[str, ...]) -> None:
    kind = scheduler.config.prediction_type
    if kind not in known:
        listed = f"{', '.join(known[:-1])} and {known[-1]}"
        raise ValueError(f"{type(scheduler).__name__} has prediction_type={kind!r}; {listed} are known.")


def _place(scheduler: Any, t: float | torch.Tensor) -> int:
    """Which of the scheduler's timesteps t is. Not its `step_index`, which belongs to the pipeline that is sampling."""
    # a scheduler of sigmas has timesteps from the start, but only after set_timesteps a step to take
    _check_steps(scheduler)
    found = (scheduler.timesteps.cpu().double() == float(t)).nonzero().flatten().tolist()
    if not found:
        raise ValueError(
            f"t = {float(t):g} is none of the {len(scheduler.timesteps)} timesteps of this {type(scheduler).__name__}."
        )
    if len(found) > 1:
        raise ValueError(
            f"{len(found)} of the {len(scheduler.timesteps)} steps of this {type(scheduler).__name__} share the timestep {float(t):g}, so "
            "their laws cannot be told apart: use fewer steps or another spacing."
        )
    return found[0]


def _sigmas(scheduler: Any, t: float | torch.Tensor) -> tuple[float, float]:
    """(sigma_k, sigma_{k+1}) of the step at t."""
    index = _place(scheduler, t)
    return scheduler.sigmas[index].item(), scheduler.sigmas[index + 1].item()


def _index(t: int | torch.Tensor) -> int:
    return int(t.item()) if isinstance(t, torch.Tensor) else int(t)


def _check_steps(scheduler) -> None:
    if getattr(scheduler, "num_inference_steps", None) is None:
        raise ValueError(f"Call `set_timesteps` on the {type(scheduler).__name__} before asking for a transition.")


def _alphas(scheduler, x: torch.Tensor) -> torch.Tensor:
    """alphas_cumprod in double precision on the host, so that the coefficients carry no rounding of their own."""
    return scheduler.alphas_cumprod.to("cpu", torch.float64)


def _clean_and_noise(scheduler, output, x, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted clean sample and noise, before clipping (DDIM eq. 12; v: arXiv 2202.00512 appendix D)."""
    a, b = math.sqrt(alpha), math.sqrt(1 - alpha)
    _check_prediction(scheduler, ("epsilon", "sample", "v_prediction"))
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return (x - b * output) / a, output
    if kind == "sample":
        return output, (x - a * output) / b
    return a * x - b * output, a * output + b * x


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
    std = torch.tensor(math.sqrt(max(variance, 0.0)), dtype=x.dtype)
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
        std = torch.zeros((), dtype=x.dtype)
    elif kind in ("fixed_small", "fixed_small_log"):
        std = torch.tensor(math.sqrt(small), dtype=x.dtype)
    elif kind == "fixed_large":
        std = torch.tensor(math.sqrt(beta), dtype=x.dtype)
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


@transition.register
def _euler_ancestral(
    scheduler: EulerAncestralDiscreteScheduler, output: torch.Tensor, t: float | torch.Tensor, x: torch.Tensor
) -> Transition:
    """Ancestral sampling (arXiv 2011.13456, appendix F) of states x = clean + sigma · noise: N(clean + (s'/s)² (x − clean), s'² (1 − s'²/s²)).

    In x / sqrt(1 + sigma²) this is DDIM with eta = 1 on the same timesteps, so it is memoryless as that is. The denoiser gets the scaled
    state (`model_input`), the transition the unscaled one.
    """
    _check_settings(scheduler)
    s, s_next = _sigmas(scheduler, t)
    kind = scheduler.config.prediction_type
    clean = x - s * output if kind == "epsilon" else x / (s * s + 1) - s / math.sqrt(s * s + 1) * output
    clean_weight, state_weight, std = posterior_coefficients((1.0, s), (1.0, s_next))
    return Transition(clean_weight * clean + state_weight * x, torch.tensor(std, dtype=x.dtype), clean)


@transition.register
def _dpm_solver(scheduler: DPMSolverMultistepScheduler, output: torch.Tensor, t: int | torch.Tensor, x: torch.Tensor) -> Transition:
    """SDE-DPM-Solver++ and SDE-DPM-Solver of order 1 (arXiv 2211.01095), on the VP or the flow schedule.

    The first holds the clean sample over the step and draws from the exact law given it: memoryless as DDIM with eta = 1, which it equals on
    the VP schedule (and `MemorylessFlowMatchScheduler` on the flow's). The second holds the noise, with a larger variance; it
    is memoryless as the number of steps grows.
    """
    _check_settings(scheduler)
    s, s_next = _sigmas(scheduler, t)
    (a, b), (a_next, b_next) = _signal_and_noise(scheduler, s), _signal_and_noise(scheduler, s_next)
    config = scheduler.config
    if config.variance_type in ("learned", "learned_range") and config.prediction_type == "epsilon":
        output = output[:, :3]  # as diffusers cuts the predicted variance off
    if output.shape != x.shape:
        raise ValueError(
            f"DPMSolverMultistepScheduler with variance_type={config.variance_type!r} makes an output of shape {tuple(output.shape)} out of "
            f"the denoiser's, for states of shape {tuple(x.shape)}: learned variances are cut off for epsilon and 3 channels only."
        )
    held_noise = config.algorithm_type == "sde-dpmsolver"
    if config.prediction_type == "epsilon":
        clean = (x - b * output) / a
    elif config.prediction_type == "sample":
        clean = output
    elif config.prediction_type == "flow_prediction":
        clean = x - s * output
    else:  # v_prediction; the two are one on the VP schedule, where a² + b² = 1
        clean = (x - b * (a * output + b * x)) / a if held_noise else a * x - b * output
    if config.thresholding:
        clean = scheduler._threshold_sample(clean)
    clean_weight, state_weight, std = posterior_coefficients((a, b), (a_next, b_next))
    if held_noise and std > 0:
        # e^h = (a'/b')·(b/a); the same step written for the noise, which is held, and then once more in terms of the clean sample
        growth = a_next * b / (b_next * a)
        noise_weight = 2 * b_next * (growth - 1)
        clean_weight, state_weight = noise_weight * a / b, a_next / a - noise_weight / b
        std = b_next * math.sqrt(growth * growth - 1)
    return Transition(clean_weight * clean + state_weight * x, torch.tensor(std, dtype=x.dtype), clean)


def _signal_and_noise(scheduler: DPMSolverMultistepScheduler, sigma: float) -> tuple[float, float]:
    """(alpha, sigma) of a state alpha · clean + sigma · noise, from the scheduler's sigma: itself (flow) or sigma/alpha (VP)."""
    if scheduler.config.use_flow_sigmas:
        return 1 - sigma, sigma
    alpha = 1 / math.sqrt(1 + sigma * sigma)
    return alpha, sigma * alpha


@transition.register
def _flow_match_euler(
    scheduler: FlowMatchEulerDiscreteScheduler, output: torch.Tensor, t: float | torch.Tensor, x: torch.Tensor
) -> Transition:
    """FlowMatchEuler's `stochastic_sampling`: N((1 − s')·clean, s'²), clean = x − s·v, with all of the noise drawn afresh.

    Memoryless from s = 1, where clean is the constant E[clean] for an exact model. But it is no sampler of the flow: the noise of x, which
    belongs to it, is thrown away, and the law of x_K is too narrow however many steps are taken (`MemorylessFlowMatchScheduler` is not). Give
    sigmas that end at 1/K: with its own, which end at 0.001, one step has so little noise that its KL is needlessly sharp.
    """
    _check_settings(scheduler)
    s, s_next = _sigmas(scheduler, t)
    clean = x - s * output
    return Transition((1 - s_next) * clean, torch.tensor(s_next, dtype=x.dtype), clean)


@transition.register
def _memoryless_flow(
    scheduler: MemorylessFlowMatchScheduler, output: torch.Tensor, t: float | torch.Tensor, x: torch.Tensor
) -> Transition:
    """The memoryless SDE of a flow (arXiv 2409.08861): see the scheduler."""
    return Transition(*scheduler.law(output, _place(scheduler, t), x))


@singledispatch
def model_input(scheduler: Any, t: float | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What the denoiser is given for the state x at t, (B, C, *): `scale_model_input`, without moving the scheduler's counter."""
    return x


@model_input.register
def _(scheduler: EulerAncestralDiscreteScheduler, t: float | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    sigma = scheduler.sigmas[_place(scheduler, t)]
    return x / ((sigma**2 + 1) ** 0.5)  # as diffusers writes it, so that the base's bits are the pipeline's


@singledispatch
def start_snr(scheduler: Any) -> float:
    """Signal to noise (of variances, for data of variance 1) in the state at the first timestep, as the pre-trained model takes it to be.

    A pipeline starts from pure noise all the same. Where there should be signal, the denoiser reads some into that noise and x_K remembers
    it, whatever noise the steps add: 0 is memoryless.
    """
    alpha = scheduler.alphas_cumprod[int(scheduler.timesteps[0])].item()
    return alpha / (1 - alpha)


@start_snr.register(EulerAncestralDiscreteScheduler)
@start_snr.register(DPMSolverMultistepScheduler)
@start_snr.register(FlowMatchEulerDiscreteScheduler)
def _(scheduler: Any) -> float:
    sigma = scheduler.sigmas[0].item()
    is_flow = isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or scheduler.config.get("use_flow_sigmas")
    return ((1 - sigma) / sigma) ** 2 if is_flow else 1 / sigma**2
